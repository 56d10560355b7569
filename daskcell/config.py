"""All settings, as one tree of models that is read from and written to YAML.

Unknown keys are refused. Every setting that decides a result is part of the content key of its stage, so a
study knows what to redo when one changes. No setting of `compute` is part of a key (see `ComputeSettings`).
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from daskcell.errors import ConfigError, InputError

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseModel):
    """Base of all sections: frozen, and strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def check_axes(axes: Any) -> str:
    """Axes in capital letters; raises `InputError` if they cannot be the axes of an image."""
    letters = axes.upper() if isinstance(axes, str) else ""
    good = set(letters) <= set("TCZYXS") and len(set(letters)) == len(letters)
    if not good or not {"Y", "X"} <= set(letters) or {"C", "S"} <= set(letters):
        raise InputError(
            f"Axes cannot be {axes!r}. They are letters of T, C, Z, Y, X, each once, with Y and X."
        )
    return letters


class InputSettings(Settings):
    """How files become images."""

    pattern: str | None = None
    """File names of images with one file per channel, such as ``{field}_{channel}.tif``; None: recognised."""
    channels: list[str] | None = None
    """Channels to use, in this order; None: all, in the order of the file."""
    pixel_size: tuple[Positive, Positive] | Positive | None = None
    """Micrometres per pixel ``(y, x)``, where the file does not say or is wrong."""
    z: int | Literal["max", "all"] = "max"
    """Plane of a stack to use, the maximum over planes, or one image per plane."""
    t: int | Literal["all"] = "all"
    """Time point to use, or one image per time point."""
    axes: str | None = None
    """Order of the axes of files and arrays that do not say it (TIFF, NumPy, Zarr), such as ``YXC``: letters
    of T, C, Z, Y, X, or S for samples of a colour image. None: ``CYX``, or ``YXC`` for a last of up to 4."""
    scenes: Literal["all"] | list[str | int] = "all"
    """Which images of a file that holds several (scenes, positions, series, fields of a plate) to use; each
    is a slide named ``<file>_<scene>``. All; or a list of names, patterns with ``*``, or numbers from 0
    on."""
    ome_zarr: Literal["0.5", "0.4"] = "0.5"
    """Version of OME-Zarr to write; 0.4 is for older viewers, and has one file per 512 x 512 pixels."""

    @field_validator("axes")
    @classmethod
    def _check_axes(cls, value: str | None) -> str | None:
        return None if value is None else check_axes(value)


class ReconstructSettings(Settings):
    """A colour image from one channel per stain."""

    colors: list[str] | Literal["auto"] = "auto"
    """Colour of each channel (any matplotlib name); auto: from channel names, else red, green, blue, cyan."""
    ratio: list[Annotated[float, Field(ge=0)]] | None = None
    """Weight of each channel; None: equal."""


class HistogramSettings(Settings):
    """Histogram adjustment over the whole image, separately for each channel."""

    method: Literal["stretch", "equalize", "clahe", "match"] = "stretch"
    low: Annotated[float, Field(ge=0, lt=100)] = 0.2
    """Percentile that becomes 0 (stretch)."""
    high: Annotated[float, Field(gt=0, le=100)] = 99.8
    """Percentile that becomes the largest value (stretch)."""
    linked: bool | Literal["auto"] = "auto"
    """All channels get the same curve, which keeps colours; auto: for colour images (stained slides)."""
    reference: str | list[str] | None = None
    """Image whose histogram is matched, or several, whose pixels are counted together (match)."""
    tiles: Annotated[int, Field(ge=1)] = 8
    """Tiles along each side of the image: more adapt to smaller structures (clahe)."""
    clip_limit: Fraction = 0.01
    """Low: little contrast; high: more contrast and more noise (clahe)."""
    bins: Annotated[int, Field(ge=2, le=16384)] = 256
    """Bins of the histogram (clahe; equalize for pixels wider than 16 bits)."""

    @model_validator(mode="after")
    def _check(self) -> HistogramSettings:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        if self.method == "match" and not self.reference:
            raise ValueError("method 'match' needs a reference image")
        return self


class BackgroundSettings(Settings):
    """Correction of uneven light in every channel, before all other steps: flat field, then rolling disc."""

    flat: str | None = None
    """Image of an evenly lit, empty field, by which pixels are divided (``daskcell flat`` makes one). As
    large as the image, or as one camera field of an image that was stitched from many, over which it is
    repeated."""
    dark: Annotated[float, Field(ge=0)] = 0.0
    """Signal of the camera without light; subtracted from the image and the flat field."""
    radius: Annotated[float, Field(ge=1)] | None = None
    """Radius in pixels of the rolling disc, larger than the largest clump of cells. Low: follows the
    background more closely and may remove parts of cells; high: leaves more background. None: nothing is
    subtracted."""
    light: bool = False
    """The background is bright (bright field): pixels are divided by it, and it becomes white."""

    @model_validator(mode="after")
    def _check(self) -> BackgroundSettings:
        if self.flat is None and self.radius is None:
            raise ValueError("a background needs a flat field ('flat'), a disc's radius ('radius'), or both")
        return self


class StainSettings(Settings):
    """Stains of a colour slide in bright field."""

    method: Literal["normalize", "separate"] = "normalize"
    """normalize: glass becomes white, and with a reference, tissue becomes as dense in each colour as there,
    so that slides of different batches look alike; separate: haematoxylin, eosin and DAB as channels
    (scikit-image's ``rgb2hed``)."""
    reference: str | None = None
    """Slide to match (normalize)."""

    @model_validator(mode="after")
    def _check(self) -> StainSettings:
        if self.method == "separate" and self.reference is not None:
            raise ValueError("a reference is for method 'normalize'")
        return self


class GaussianSettings(Settings):
    sigma: Positive = 1.0
    """Standard deviation in pixels."""


class PreprocessSettings(Settings):
    """Steps before segmentation, in this order; None leaves a step out."""

    background: BackgroundSettings | None = None
    stains: StainSettings | None = None
    reconstruct: ReconstructSettings | None = ReconstructSettings()
    histogram: HistogramSettings | None = HistogramSettings()
    gaussian: GaussianSettings | None = None

    @model_validator(mode="after")
    def _check(self) -> PreprocessSettings:
        matched = self.histogram is not None and self.histogram.method == "match"
        if matched and self.stains is not None and self.stains.method == "normalize":
            raise ValueError("stains and histogram both match the image to a reference: leave one out")
        return self


class WatershedSettings(Settings):
    """Threshold, distance transform, markers, flooding; and two remedies for over-segmentation."""

    threshold: float | None = None
    """Intensity on the 0-1 scale above which a pixel is a cell; None: Otsu over the whole image."""
    dark: bool | Literal["auto"] = "auto"
    """Cells are darker than the background (stained, bright field); auto: by the image's border and
    median."""
    opening: Annotated[int, Field(ge=0)] = 2
    """Radius in pixels of the morphological opening (first remedy); 0: none."""
    min_distance: Annotated[int, Field(ge=1)] = 7
    """Smallest distance in pixels between two markers: low splits cells, high joins them."""
    merge: bool = True
    """Join similar sub-regions (second remedy)."""
    merge_similarity: Fraction = 0.75
    """How much of the inner brightness a shared border must keep for two sub-regions to be one cell."""


METHODS = ("cellpose", "watershed")
"""Segmentation methods of daskcell itself."""


def installed_methods() -> tuple[str, ...]:
    """Names of all segmentation methods: daskcell's, then those of other packages."""
    found = {point.name for point in entry_points(group="daskcell.methods")}
    return *METHODS, *sorted(found - set(METHODS))


class SegmentSettings(Settings):
    method: str = "cellpose"
    """``cellpose``, ``watershed``, or the name of a method that another package installs
    (`daskcell.segmentation.methods`)."""
    options: dict[str, Any] = {}
    """Options of a method that another package installs."""
    model: str = "tiny"
    """``tiny`` (embedded), ``cpsam_v2``, or a file of weights."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Number format the network computes in; None: float32, and bfloat16 for Cellpose-SAM, as in Cellpose.
    Processors that only emulate bfloat16 (``daskcell doctor`` says so) take about ten times as long."""
    normalize: Literal["signal", "cellpose"] = "signal"
    """Intensities that become 0 and 1 for the network. cellpose: the 1st and 99th percentile of all pixels;
    signal: the same without padding, and where cells cover so little that the percentile lies in the noise of
    the background, the brightness of the cells (``daskcell/preprocess/signal.py``)."""
    channels: list[int] | None = None
    """Channels of the preprocessed image the network sees (at most three); None: all."""
    diameter: Positive | Literal["auto"] | None = "auto"
    """Cell diameter in pixels; None: no rescaling; auto: estimated from a first pass over the image."""
    cellprob_threshold: float = 0.0
    """Low: more and larger cells; high: fewer and smaller."""
    flow_threshold: Annotated[float, Field(ge=0)] = 0.4
    """Largest flow error of a cell; 0: not checked."""
    min_size: Annotated[int, Field(ge=0)] = 15
    """Smallest cell in pixels."""
    max_size_fraction: Fraction = 0.4
    """Cells larger than this share of the whole image are dropped."""
    niter: Annotated[int, Field(ge=1)] | None = None
    """Steps along the flows; None: as Cellpose chooses."""
    batch_size: Annotated[int, Field(ge=1)] | None = None
    """Tiles per call of the network. Batches are padded to this size, since results may depend on it in the
    last bit. None: 8 on a GPU, 1 on a CPU, where larger batches only overflow the cache."""
    tissue_mask: bool = False
    """Skip tiles of bare glass (bright-field slides)."""
    keep_flows: bool = False
    """Keep the network's output, so that thresholds can be changed without running it again."""
    watershed: WatershedSettings = WatershedSettings()

    @field_validator("method")
    @classmethod
    def _check_method(cls, value: str, info: ValidationInfo) -> str:
        # Asked of settings that are given, not of those a study was made with: it may be read without it.
        if info.context is not None and value not in METHODS and value not in (names := installed_methods()):
            raise ValueError(f"installed methods are {', '.join(names)}")
        return value


class FeatureSettings(Settings):
    encoder: str = "tiny"
    """``tiny`` (embedded), any torchvision name (``resnet152``), ``timm:NAME``, or a TorchScript or
    torch.export file."""
    layer: Literal["output", "pool"] = "output"
    """The network's outputs (1000 for ImageNet's), or the vector before its last layer (2048)."""
    size: Annotated[int, Field(ge=8)] | None = None
    """Side in pixels a crop is resized to; None: the encoder's own."""
    margin: Annotated[float, Field(ge=0)] = 0.1
    """Margin around a cell, as a share of its larger side."""
    window: Annotated[int, Field(ge=8)] | None = None
    """Side in pixels of a square around every cell, instead of the margin: keeps all cells at one scale."""
    channels: list[Annotated[int, Field(ge=0)]] | None = None
    """Channels of the preprocessed image the encoder sees; None: all (at most seven)."""
    mask: bool = True
    """Blank out everything that is not the cell (crop) or no cell (mask), with the colour of the
    background."""
    pooling: Literal["crop", "mask"] = "crop"
    """``crop``: the network runs on the crop of each cell; ``mask``: it runs once over the image, and its
    feature maps are pooled over each cell. Many times faster for small cells; for ``tiny`` and torchvision's
    ResNets."""
    scale: Positive | Literal["auto"] = 1.0
    """Network pixels per pixel of the image (mask), the same for all slides; cells 30 to 100 network pixels
    wide are described best. auto: by the median cell of each slide by itself, for slides of various
    magnifications; slides of few cells are then hard to compare."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is faster where the processor has it, and moves features by about a hundredth."""
    measurements: bool | list[Literal["shape", "intensity", "texture"]] = True
    """Kinds of measurements in the cells table; true: all, false: only where cells are, and their area."""

    @property
    def measured(self) -> tuple[str, ...]:
        """The kinds of measurements."""
        if isinstance(self.measurements, bool):
            return ("shape", "intensity", "texture") if self.measurements else ()
        return tuple(self.measurements)


class ClusterSettings(Settings):
    k: Annotated[int, Field(ge=2, le=65534)] | Literal["auto"] = 11
    """Number of clusters; auto: the one from 2 to 20 that is most compact and most stable."""
    use: list[Literal["encoder", "measurements"]] = ["encoder"]
    """What cells are compared by: the encoder's vectors, the table's measurements, or both at equal
    weight."""
    engine: Literal["incremental", "parallel"] = "parallel"
    """Rounds over all cells until the centres stand: the same bits in any order; or one pass of mini-batches
    (dask-ml's ``Incremental``)."""
    standardise: bool = True
    """Bring every feature to mean 0 and deviation 1."""
    components: Annotated[int, Field(ge=1)] | None = 32
    """Principal components kept (IncrementalPCA); None: all features."""
    unit_length: bool = False
    """Scale every cell's vector to length 1: helps balanced sets, hurts unbalanced ones."""
    seed: int = 0


class OutputSettings(Settings):
    channels: bool = False
    """Write every channel as its own .tif."""
    preprocessed: bool = False
    """Write the preprocessed image as .tif."""
    overlays: list[Literal["tif", "png"]] = ["tif", "png"]
    """Write the image with its cells coloured by cluster."""
    overlay_side: Annotated[int, Field(ge=256)] = 8192
    """Longest side in pixels of an overlay; larger images are drawn from a level of their pyramid."""
    report: bool = True
    """Write ``report.html``: the clusters with their cells, the slides, and how well it went, on one page."""


class JobSettings(Settings):
    """Jobs of a batch queue, under dask-jobqueue's names.

    Settings that are None come from the site's Dask YAML (``jobqueue: slurm: ...``).
    """

    count: Annotated[int, Field(ge=1)] = 1
    """Number of jobs; a job that ends is submitted again."""
    minimum: Annotated[int, Field(ge=1)] | None = None
    """Jobs to keep while there is little work; None: all."""
    cores: Annotated[int, Field(ge=1)] | None = None
    """Cores of a job, shared by one worker per `compute.threads`; a GPU job has one worker."""
    memory: str | None = None
    """Memory of a job, such as ``64GB``, shared evenly by its workers."""
    walltime: str | None = None
    """In the format of the queue, such as ``04:00:00``; workers leave in good order before it ends."""
    queue: str | None = None
    """Queue, or partition."""
    account: str | None = None
    """Account, or project."""
    interface: str | None = None
    """Network interface that the nodes and this machine share, such as ``ib0``."""
    log_directory: str | None = None
    """Folder for the output of the jobs; None: ``daskcell-jobs`` in the current folder."""
    job_extra_directives: list[str] | None = None
    """More options of the queue, such as ``--constraint=avx512``."""
    job_script_prologue: list[str] | None = None
    """Shell commands before a worker starts, such as ``module load cuda``."""
    options: dict[str, Any] = {}
    """Other arguments of the dask-jobqueue class, such as ``resource_spec`` or ``local_directory``."""


class ComputeSettings(Settings):
    """Where the work runs. Results do not depend on the number and kind of workers or on the size of blocks.
    The `device` on which networks run, and the number of `threads`, change the last bits of their outputs,
    since sums are then computed in another order; both are recorded with each result."""

    kind: str = "auto"
    """``auto`` (``inline`` where all inputs together fit one block and `workers` is not set, else ``local``),
    ``local`` (worker processes here), ``gpu`` (the same, and one per GPU of this machine), ``inline`` (this
    process), ``slurm``, ``pbs``, ``lsf``, ``sge`` (jobs), or the address of a Dask scheduler
    (``tcp://host:port``)."""
    workers: Annotated[int, Field(ge=1)] | None = None
    """Worker processes on this machine; None: one per core, or fewer where they would have too little
    memory."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Threads of torch, BLAS and numba in each worker; see above for what depends on them."""
    memory: str = "auto"
    """Memory limit per worker on this machine."""
    block: Annotated[int, Field(ge=256, multiple_of=16)] = 2048
    """Side in pixels of the blocks into which images are cut."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where networks run; auto: ``cuda`` with kind ``gpu`` or `gpu_jobs`, else ``cpu`` even if there is a
    GPU."""
    task_seconds: Positive = 3600.0
    """Longest time for one task: a block, or a slide of at most two blocks. A task that hangs is tried three
    times, on other workers where there are any; then its slide is set aside."""
    wait: Positive | None = None
    """Seconds to wait for workers; None: a minute, or an hour for jobs."""
    dashboard: int | str | None = None
    """Where Dask's dashboard listens, such as 8787 (on 127.0.0.1) or ``0.0.0.0:8787``; it has no password.
    None: no dashboard."""
    jobs: JobSettings = JobSettings()
    """Jobs of kind slurm, pbs, lsf or sge."""
    gpu_jobs: JobSettings | None = None
    """Jobs with one GPU each beside them; settings that are missing are those of `jobs`."""

    @property
    def network_device(self) -> str:
        """``cpu`` or ``cuda``."""
        if self.device != "auto":
            return self.device
        return "cuda" if self.kind == "gpu" or (self.kind in QUEUES and self.gpu_jobs) else "cpu"

    @model_validator(mode="after")
    def _check(self) -> ComputeSettings:
        if self.kind == "gpu" and self.device == "cpu":
            raise ValueError("kind 'gpu' needs device 'cuda' or 'auto'")
        if self.kind in QUEUES and self.device == "cuda" and self.gpu_jobs is None:
            raise ValueError(f"device 'cuda' on {self.kind} needs gpu_jobs, such as 'gpu_jobs: {{count: 1}}'")
        return self


QUEUES = ("slurm", "pbs", "lsf", "sge")
"""Kinds of batch queues."""
HERE = ("auto", "local", "gpu", "inline")
"""Kinds that use nothing but this machine."""


class Config(Settings):
    """Everything a run needs besides its inputs and its output folder."""

    input: InputSettings = InputSettings()
    preprocess: PreprocessSettings = PreprocessSettings()
    segment: SegmentSettings = SegmentSettings()
    features: FeatureSettings = FeatureSettings()
    cluster: ClusterSettings = ClusterSettings()
    output: OutputSettings = OutputSettings()
    compute: ComputeSettings = ComputeSettings()

    @field_validator("*", mode="before")
    @classmethod
    def _empty_section_means_defaults(cls, value: Any) -> Any:
        return {} if value is None else value


def parse_config(values: dict[str, Any], source: str = "config") -> Config:
    """Settings from nested dictionaries.

    Parameters
    ----------
    values : dict
        Sections and settings; what is missing has its default.
    source : str
        What to call `values` in errors.

    Raises
    ------
    ConfigError
        For unknown or unsuitable settings: one sentence each, with the setting and its value.

    Examples
    --------
    >>> parse_config({"segment": {"diameter": 30}}).segment.diameter
    30.0
    >>> parse_config({"segment": {"diametre": 30}})
    Traceback (most recent call last):
    daskcell.errors.ConfigError: config: unknown setting 'segment.diametre'
    """
    try:
        return Config.model_validate(values, context={"installed": True})
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_sentences(error))) from None


def load_config(path: str | Path) -> Config:
    """Read settings from a YAML file.

    Parameters
    ----------
    path : str or Path
        Such as those in ``configs/``; sections and settings that are missing have their defaults.

    Raises
    ------
    ConfigError
        If the file cannot be read, is not YAML, or has unknown or unsuitable settings.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the config {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path} is not YAML{where}: {getattr(error, 'problem', None) or error}.") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} must hold sections such as 'segment:', but holds a {type(values).__name__}."
        )
    return parse_config(values, str(path))


def _sentences(error: ValidationError) -> list[str]:
    sentences = []
    for problem in error.errors():
        # pydantic names the tried type of a union as a last step ("k.int"): only names of settings are kept.
        steps = [str(step) for step in problem["loc"]]
        known = [step for step in steps if step.isidentifier() and step not in _TYPE_STEPS]
        where = ".".join(known) or "config"
        if problem["type"] == "extra_forbidden":
            sentences.append(f"unknown setting '{where}'")
        else:
            sentences.append(f"'{where}' cannot be {problem['input']!r} ({problem['msg']})")
    return list(dict.fromkeys(sentences))


_TYPE_STEPS = {"int", "float", "str", "bool", "tuple", "literal"}
