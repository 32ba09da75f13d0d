"""What a GPU and the MPI beside it can do, by trying it: asked of libraries, the answer is unsure.

    survey   the first rank of each host  ->  kept (a file of an earlier try that still fits)
                                          \\-> attempt (children with a time limit)  ->  trials
             all ranks                    <-  which transports cannot be used, and why

A child may crash, hang, or spoil its context: the run does not notice. Each trial does on small
buffers what the transport of its name does in a step, and compares what comes out. ``attempt`` and
``kept`` import nothing heavy.
"""
