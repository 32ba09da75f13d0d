"""The codecs on a device whose work is queued: the same bits as on the host, by its kernels.

A form is made of a codec for one stream and for pieces of the sizes that one exchange has. Its
methods are the codec's; they give their work to the stream and return. Scratch memory is the
form's own, so a stream's order is all that keeps its pieces apart.
"""
