"""The section `encode:` of params.yaml: how states are made."""

import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from pipeline.config import Section

CUT_PATH = re.compile(r"\w[\w-]*(\.[\w-]+)*(#\d+)?")
"""Names of modules joined by dots, and the number of a call. A cut names a directory too: nothing else may pass."""


class ExecutorConfig(Section):
    """The executor of the units of an encode. It does not change what is stored; docs/cluster.md has recipes."""

    kind: Literal["local", "dask", "slurm"] = "local"
    """"local": processes on this machine. "dask": the workers of a dask.distributed scheduler. "slurm": the tasks of a
    job array that sbatch submits. All workers must see the project's folder under the same path."""
    processes: int | None = Field(default=None, ge=1)
    """local: number of processes; each has its own accelerator if there are any, and they share the cores. Unset: 1,
    the process that was started."""
    address: str | None = Field(default=None, min_length=1)
    """dask: address of a running scheduler, such as tcp://host:8786. Unset: the environment variable
    DASK_SCHEDULER_ADDRESS."""
    jobqueue: Literal["slurm", "pbs", "lsf", "sge", "oar", "moab", "htcondor"] | None = None
    """dask: start a scheduler here, and its workers as batch jobs of this system (dask-jobqueue)."""
    jobs: int | None = Field(default=None, ge=1)
    """slurm: tasks of the array. jobqueue: batch jobs, which may come and go. Unset: 1."""
    resources: dict[str, float] = Field(default_factory=dict)
    """dask: worker resources that a unit takes, as in {GPU: 1}; only workers that declare them receive units."""
    threads: int | None = Field(default=None, ge=1)
    """Torch threads of each worker. Unset: local processes share the cores, workers of a jobqueue have the cores in
    `options`, and all others follow their environment (dask starts workers with OMP_NUM_THREADS=1)."""
    retries: int = Field(default=2, ge=0)
    """How often a unit that kills its process is tried again before its samples are set aside."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the scheduler. slurm: of sbatch, as in {partition: gpu, gres: "gpu:1"}; true for an option without a
    value. jobqueue: arguments of the dask-jobqueue cluster, as in {cores: 8, memory: 32GB, queue: gpu}."""

    @property
    def is_here(self) -> bool:
        """Return whether the process that was started runs all units itself."""
        return self.kind == "local" and (self.processes or 1) == 1

    def _faults(self) -> Iterator[str]:
        used = {
            "local": {"processes", "threads", "retries"},
            "dask": {"address", "jobqueue", "resources", "threads", "retries"},
            "slurm": {"jobs", "options", "threads", "retries"},
        }[self.kind]
        used |= {"jobs", "options"} if self.jobqueue else set()
        for name in sorted(self.model_fields_set - used - {"kind"}):
            if getattr(self, name) not in (None, {}):
                alone = " without jobqueue" if self.kind == "dask" and name in ("jobs", "options") else ""
                yield f"{name} is {getattr(self, name)!r}, which kind {self.kind} does not use{alone}; remove it"
        if self.address and self.jobqueue:
            yield f"address is {self.address!r} and jobqueue is {self.jobqueue!r}; keep one"


class EncodeConfig(Section):
    """How states are made. Only `cuts`, `dtype`, `codec`, `precision` and `views` decide what is stored."""

    cuts: list[float | int | str] = Field(min_length=1)
    """Places to split the network: a share of the blocks (0.5; 0 stores the inputs, 1 leaves only the head to train), a
    number of blocks from 2 on (6), or a module path ("layer3"; "layer#2" for its third call). `recycle cuts` lists them
    with their costs. One pass serves all cuts."""
    store: str | None = None
    """Location of the stores: null for the folder data/activations, or a URL below which each cut has its folder:
    `s3://BUCKET/PREFIX`, `gs://`, `az://` or `file:///FOLDER`. Credentials, endpoint and region come from the
    environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, AWS_REGION, ...). Training downloads segments to local scratch
    (`train.scratch_gb`)."""
    store_options: dict[str, str | int | bool] = Field(default_factory=dict)
    """Options of obstore for `store` that the environment does not give: {endpoint: ..., region: ...}. Secrets are
    refused."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Stored type of floating-point values; a tensor that leaves the range of float16 is stored as bfloat16."""
    codec: Literal["raw", "zstd", "int8", "int8-channel", "int8-group", "int4-group"] = "raw"
    """How states are stored. "raw": uncompressed and memory-mapped. "zstd": compressed without loss, unpacked to local
    scratch for training. "int8": one byte per value and one scale per row (token, channel map); "int8-channel": one
    scale per channel. "int8-group", "int4-group": 9 and 5 bits per value, with a scale per 64 values and the largest of
    them exact, for states with a few very large values (language models). `recycle store error` measures what these
    change."""
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    """Compute type of the prefix; null for the type of its weights (`model.dtype`). Below that of weights in float32,
    it computes under autocast."""
    batch_size: int = Field(default=64, ge=1)
    """Samples per forward pass of the prefix."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per forward pass of the prefix, padding included, in place of `batch_size` for samples of unequal length:
    many short texts, or few long ones, at a time. Of sounds it counts frames, or values of the wave."""
    views: int | None = Field(default=None, ge=1)
    """Augmented views stored of each training sample, made by `preprocess.augment`; null for none. Each view is a store
    of its own beside the plain one, which then holds only the held-out samples. A larger number encodes only the new
    views, a smaller one leaves the others in place. While a segment is encoded, the inputs of all its views stay in
    memory (0.15 MB each at 224 pixels)."""
    segment_samples: int = Field(default=512, ge=1)
    """Samples per segment, the unit of work that is committed as a whole."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read and preprocess samples; 0 does it in the main process. null: 0 if the prefix runs on the CPU,
    where it uses all cores itself, else one per core."""
    executor: ExecutorConfig = ExecutorConfig()
    """The executor of the units: this process, several processes, or a cluster."""
    device: str = "auto"
    """"auto" (the accelerator if there is one), "cpu", "cuda:0", ..."""
    compile: bool = False
    """Compile the blocks before the cut by torch.compile, which takes a minute or more at the start of each process. On
    a CPU it needs a C++ compiler, and seldom pays (benchmarks/README.md)."""
    placement: Literal["auto", "memory", "stream"] = "auto"
    """Where the weights of the network are while samples are encoded. "memory": all in memory. "stream": in their files
    (hf: networks in safetensors); all batches of a segment go through one block before any enters the next, whose
    weights are read meanwhile. The states are the same. "auto" streams what exceeds the free memory of `device`."""
    memory_gb: float = Field(default=2.0, gt=0)
    """stream: memory for the batches that wait between two blocks, in GB. A segment that needs more is computed in
    groups of batches, and the weights are read once for each group."""
    channels_last: bool = False
    """Run image backbones in channels-last memory format: faster on most accelerators."""
    suffix: bool = True
    """Store the pretrained weights after each cut beside its store (`<cut>/suffix`), so that the store can be trained
    from without the weights of `model`. They take as much disk as those weights."""
    replace: bool = False
    """Remove stores of other settings that are in the way. If false, and without `recycle encode --replace`, such an
    encode is refused and nothing is lost."""
    max_bad: int | float = Field(default=0, ge=0)
    """Bad samples tolerated before the run ends with exit code 3: a count, or, below 1, a fraction of the data set."""

    def tolerated(self, samples: int) -> int:
        """Return how many bad ones `max_bad` tolerates among so many samples."""
        return int(self.max_bad if self.max_bad >= 1 else self.max_bad * samples + 1e-9)

    @field_validator("cuts")
    @classmethod
    def _distinct(cls, cuts: list[float | int | str]) -> list[float | int | str]:
        for cut in cuts:
            check_cut(cut)
        if len({str(cut) for cut in cuts}) != len(cuts):
            raise ValueError("a cut is listed twice; name each once")
        return cuts


def check_cut(cut: float | int | str) -> None:
    """Raise ValueError unless `cut` is one as `EncodeConfig.cuts` describes them."""
    if isinstance(cut, str):
        if not CUT_PATH.fullmatch(cut):
            raise ValueError(f"{cut!r} is no module path: names joined by dots, as in encoder.layer.6")
    elif not (0 <= cut <= 1 or (isinstance(cut, int) and cut > 1)):
        raise ValueError(
            f"a share of the blocks lies in 0..1, a number of blocks is whole and from 2 on; {cut} is neither, "
            "and a module path is a string"
        )
