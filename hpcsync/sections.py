"""The sections of a configuration: every key with its default, its text and its range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .schema import key

ALGORITHMS = ("auto", "hierarchical", "direct", "ring", "halving", "doubling", "native")
CODECS = (
    "none",
    "bf16",
    "fp16",
    "fp8",
    "int8",
    "int4",
    "onebit",
    "topk",
    "threshold",
    "randomk",
    "powersgd",
    "int8_shared",
)
RAIL_ALGORITHMS = ("auto", "direct", "ring", "halving", "doubling", "native")

NODE_TRANSPORTS = (
    *("auto", "shared_memory", "mpi_host"),
    *("cuda_ipc", "mpi_device", "mpi_staged", "nccl"),
)
RAIL_TRANSPORTS = ("auto", "mpi_host", "mpi_device", "mpi_staged")
# Of device memory.
NODE_OF_GPUS = ("cuda_ipc", "mpi_device", "mpi_staged", "nccl")
RAIL_OF_GPUS = ("mpi_device", "mpi_staged")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The run: its seed and folder."""

    seed: int = key(
        0,
        "Seed of the weights, of the order of the data and of dropout.",
        minimum=0,
        maximum=2**63 - 1,
    )
    name: str = key(
        "", "Name of the run's folder. Empty: made from the name of the deck and the time."
    )
    dir: str = key("runs", "Folder in which the run's folder is made.", required=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The training: steps, batch, optimizer, precision."""

    steps: int = key(200, "Optimizer steps of the whole run.", minimum=1)
    lr: float = key(1e-3, "Learning rate at the end of the warm-up.", minimum=0)
    min_lr: float = key(
        0.1, "Learning rate at the end of the cosine, as a fraction of lr.", minimum=0, maximum=1
    )
    warmup: int = key(20, "Steps in which the learning rate grows from 0 to lr.", minimum=0)
    global_batch: int = key(
        16,
        "Samples a step, over all ranks and micro-batches: "
        "ranks x accumulate x micro-batch. Results do not depend on the number of ranks.",
        minimum=1,
    )
    accumulate: int = key(
        1,
        "Micro-batches a rank runs one after the other in a step. More of them take less "
        "memory and more time; gradients are exchanged once a step.",
        minimum=1,
    )
    clip_norm: float = key(
        1.0,
        "Largest norm of all gradients together; larger ones are scaled down. 0: off.",
        minimum=0,
    )
    optimizer: str = key(
        "adamw",
        "Optimizer: adamw; or onebit_adam, which after train.freeze steps keeps the variance and "
        "exchanges momentum in place of gradients, as compress.codec=onebit likes it.",
        choices=("adamw", "onebit_adam"),
    )
    freeze: int = key(100, "Steps of onebit_adam in which the variance is still learnt.", minimum=1)
    weight_decay: float = key(
        0.1, "AdamW's decay of matrices; vectors such as biases are left alone.", minimum=0
    )
    beta1: float = key(0.9, "AdamW's decay of the mean of gradients.", minimum=0, below=1)
    beta2: float = key(0.95, "AdamW's decay of the mean of squared gradients.", minimum=0, below=1)
    eps: float = key(1e-8, "AdamW's guard against division by zero.", above=0)
    device: str = key(
        "auto",
        "What computes: cuda, a GPU for each rank; or cpu. auto: cuda where every rank has a GPU "
        "that can be used.",
        choices=("auto", "cpu", "cuda"),
    )
    precision: str = key(
        "fp32",
        "Arithmetic of forward and backward: fp32, or bf16 by torch.autocast. Weights, sums of "
        "gradients and the optimizer stay in FP32.",
        choices=("fp32", "bf16"),
    )
    loss_scale: float | str = key(
        "none",
        "Factor on the loss before the backward pass, taken out of the gradients again: "
        "dynamic grows it, and halves it when gradients overflow.",
        choices=("none", "dynamic"),
        above=0,
    )
    activation_checkpointing: bool = key(
        False,
        "Compute activations again in the backward pass: less memory, about a third more time.",
    )
    compile: bool = key(False, "Pass the model through torch.compile.")
    eval_every: int = key(
        50, "Steps between evaluations on held-out data. 0: only at the end.", minimum=0
    )
    eval_batches: int = key(
        16, "Global batches of held-out data in an evaluation, at most.", minimum=1
    )
    max_skipped: int = key(
        10, "Steps in a row with gradients of NaN or Inf before the run stops.", minimum=0
    )
    threads: int = key(
        1, "Threads of torch a rank. 0: torch's own choice.", minimum=0, maximum=1024
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The model."""

    name: str = key(
        "gpt",
        'Model: gpt, mlp, convnet, or your own function as "package.module:name".',
        required=True,
    )
    layers: int = key(4, "Blocks, or hidden layers.", minimum=1)
    width: int = key(
        192, "Features between blocks, and of layers that have no width of their own.", minimum=1
    )
    heads: int = key(6, "Attention heads of gpt; width must divide by it.", minimum=1)
    context: int = key(128, "Tokens, or bytes, a sample of text has.", minimum=1)
    hidden: int = key(
        0,
        "Features inside a block of gpt (0: 4 x width); width of mlp and convnet (0: width).",
        minimum=0,
    )
    dropout: float = key(0.0, "Share of activations dropped in training.", minimum=0, below=1)
    init_from: str = key(
        "",
        "Weights that a new run starts from: a file .pt or .safetensors, a run folder, or a folder "
        "of a checkpoint. Empty: random ones, from run.seed.",
    )
    init_strict: bool = key(
        True,
        "The weights of model.init_from must be all that the model has, and no others; false: "
        "what is missing stays random, and what the model lacks is left out.",
    )
    options: Mapping[str, Any] = key({}, "Further keyword arguments of the model's function.")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The training data."""

    name: str = key(
        "stdlib",
        "Data: stdlib (the source text of the running Python's standard library), text (files "
        "of your own, by bytes), tokens (an HDF5 file), digits (scikit-learn's handwritten "
        'digits), or your own function as "package.module:name".',
        required=True,
    )
    path: str = key(
        "", "File, folder or glob pattern of text, or file of tokens; from the current folder."
    )
    val_fraction: float = key(0.05, "Share of the data held out for evaluation.", above=0, below=1)
    options: Mapping[str, Any] = key({}, "Further keyword arguments of the data's function.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TopologyConfig:
    """Which ranks share a node."""

    ranks_per_node: int = key(
        0,
        "Ranks that share a node. 0: those with the same host name. Another number cuts each "
        "host into nodes of this many ranks, to try a hierarchy on one machine.",
        minimum=0,
    )
    share_devices: bool = key(
        False, "Two ranks may compute on the same GPU. Otherwise that ends the job at its start."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CommConfig:
    """The exchange of gradients."""

    bucket_mb: float = key(
        25.0,
        "Most MiB of a bucket. Gradients are exchanged a bucket at a time: small buckets start "
        "sooner, large ones use the network better. A small model is cut into about 8.",
        above=0,
    )
    first_bucket_mb: float = key(
        1.0,
        "Size in MiB of the bucket that is ready first, so that exchange starts early.",
        above=0,
    )
    overlap: bool = key(
        True, "Exchange gradients while the backward pass runs. The results are the same bits."
    )
    algorithm: str = key(
        "auto",
        "Algorithm of the sum over all ranks: hierarchical sums in nodes, then across; the "
        "others see all ranks alike; native is MPI's own. auto: hierarchical on several nodes.",
        choices=ALGORITHMS,
    )
    rail_algorithm: str = key(
        "auto",
        "Algorithm of the sum across nodes in a hierarchical one. auto: the cheapest by size.",
        choices=RAIL_ALGORITHMS,
    )
    node_transport: str = key(
        "auto",
        "How ranks of a node exchange. On the host: shared_memory, or messages of mpi_host. On "
        "GPUs: cuda_ipc (they read each other's memory), nccl, mpi_device (MPI takes device "
        "memory) or mpi_staged (through pinned memory). auto: the first of them that works here, "
        "but for nccl; another that cannot work is an error.",
        choices=NODE_TRANSPORTS,
        name="transport.node",
        formerly="node_transport",
    )
    rail_transport: str = key(
        "auto",
        "How nodes exchange. On the host: mpi_host. On GPUs: mpi_device or mpi_staged. auto: "
        "mpi_device where MPI was seen to take device memory, else mpi_staged.",
        choices=RAIL_TRANSPORTS,
        name="transport.rail",
    )
    reproducible: bool = key(
        False,
        "Add in an order that depends on neither bucket size nor placement of ranks: the same "
        "bits from both, at some cost in speed.",
    )
    priority: bool = key(True, "Front layers first: the next step needs their gradients first.")
    credit_mb: float = key(
        16.0, "MiB on the way at once; more waits, so that what is urgent can pass.", above=0
    )
    segment_mb: float = key(
        1.0, "Size in MiB of the pieces of a bucket, exchanged one behind the other.", above=0
    )
    timeout_s: float = key(
        300.0,
        "Seconds without progress of an exchange after which it is reported as stuck and the "
        "job ends.",
        above=0,
        maximum=1e7,
    )
    costs: str = key(
        "hpcsync-costs.json",
        "Where `python -m hpcsync.preflight` saved what links cost. compress.codec=auto takes it "
        "in place of a probe of its own where it fits the job, and says so. Empty: never.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressConfig:
    """Compression of gradients."""

    codec: str = key(
        "none",
        f"How gradients are coded on the way: {', '.join(CODECS)}; auto measures and chooses "
        'among compress.allow; or your own class as "package.module:name".',
        required=True,
    )
    allow: tuple[str, ...] = key(
        ("none", "bf16"), "Codecs among which compress.codec=auto may choose.", required=True
    )
    where: str = key(
        "rail",
        "Where gradients are coded: rail, between nodes only, where bytes are dear; or all, "
        "between all ranks.",
        choices=("rail", "all"),
    )
    error_feedback: bool = key(
        True, "Remember what coding lost, and add it to the next step's gradient."
    )
    warmup: int = key(20, "First steps, which go uncoded.", minimum=0)
    vectors: bool = key(
        False, "Code one-dimensional parameters too (biases, norms): few bytes, much harm."
    )
    min_elements: int = key(1024, "Parameters of fewer elements go uncoded.", minimum=0)
    rounding: str = key(
        "nearest",
        "Rounding of bf16, fp16, fp8, int8, int4 and int8_shared: to the nearest value, or "
        "stochastic, without bias, from run.seed.",
        choices=("nearest", "stochastic"),
    )
    ratio: float = key(
        0.01, "Share of the elements that topk and randomk send.", above=0, maximum=1
    )
    ratio_warmup: int = key(
        0, "Coded steps in which topk's share falls from a quarter to compress.ratio.", minimum=0
    )
    momentum: float = key(
        0.0,
        "Momentum correction of topk (deep gradient compression), for optimizers without a "
        "momentum of their own. 0: none.",
        minimum=0,
        below=1,
    )
    threshold: float = key(1e-3, "Magnitude from which threshold sends an element.", above=0)
    rank: int = key(4, "Rank of powersgd's factors.", minimum=1)
    verify: bool = key(
        False, "Check each integer sum of int8_shared by a checksum; end the job where it differs."
    )
    options: Mapping[str, Any] = key({}, "Further settings, for codecs of your own.")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints, RUN/checkpoints."""

    every: int | str = key(
        "10min",
        "Between checkpoints: steps, as 500; a time, as 30s, 10min or 2h; or auto, which weighs "
        "what one costs against what a failure would (checkpoint.mtbf_h). 0: none on the way.",
        minimum=0,
    )
    keep: int = key(3, "Checkpoints that are kept, the newest ones.", minimum=1)
    keep_every: int = key(0, "Keep those of each so many steps for ever. 0: none.", minimum=0)
    at_end: bool = key(True, "Save at the end, and when a signal stops the run.")
    async_: bool = key(True, "Write in the background, while training goes on.")
    files: str = key(
        "rank", "Files of a checkpoint: one a rank, or one a node.", choices=("rank", "node")
    )
    mtbf_h: float = key(
        24.0, "Mean hours between failures of the job, for checkpoint.every=auto.", above=0
    )
    replay_log: bool = key(
        False,
        "Log each step's reduced gradients, so that a resumed run loses none of the steps that "
        "came after its checkpoint.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceConfig:
    """Timing traces, RUN/trace."""

    enabled: bool = key(True, "Write traces. The last spans of each rank are remembered anyway.")
    every: int = key(10, "Each so many steps one is written; histograms count all.", minimum=1)
    ring: int = key(
        16384, "Spans that each rank remembers; 56 bytes each.", minimum=64, maximum=1 << 26
    )
    nvtx: bool = key(
        False, "Mark steps, their parts and exchanges for Nsight Systems, on GPUs (NVTX ranges)."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """Metrics for other programs: Prometheus, by a file or by HTTP, and TensorBoard."""

    textfile: str = key(
        "",
        "File for the textfile collector of Prometheus's node exporter, which rank 0 replaces "
        "every second; it takes those named *.prom in its folder. With {rank} in it, each rank "
        "writes its own. Empty: none.",
    )
    http_port: int = key(
        0,
        "Port for Prometheus on the ranks of metrics.http_ranks, on all addresses of their hosts; "
        "further ranks of a node take the ports after it, in order. 0: none.",
        minimum=0,
        maximum=65535,
    )
    http_ranks: tuple[int, ...] = key(
        (0,), "Ranks that answer on metrics.http_port, those that the job has.", minimum=0
    )
    tensorboard: bool = key(False, "Write curves for TensorBoard, RUN/tensorboard.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is told on the way."""

    every_s: float = key(
        5.0, "Seconds between lines of progress in a log file.", minimum=0, maximum=1e7
    )
