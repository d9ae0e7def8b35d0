"""Train an ensemble: one loop, explicit state, resumable to the same bits, on one device or several processes.

Every random choice is keyed: the order of the data by (seed, epoch), augmentation by (seed, epoch, example), quantizer
noise by (seed, step, layer, example). The state of the training is therefore the weights, the optimizer, the terms'
memory and two integers; nothing else is saved, and a process that is killed at any moment resumes to the same end. On
CUDA a step that allows it is recorded and replayed (`capture`); its noise is keyed by (seed, layer, step and example).
"""

import hashlib
import json
import math
import operator
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, SupportsIndex, final, get_args

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from bitquorum import rng
from bitquorum.capture import CapturedStep, fits_capture
from bitquorum.conversion import calibrate
from bitquorum.data import Augment, ImageSet
from bitquorum.ensemble import Ensemble
from bitquorum.files import load_tensors, save_tensors
from bitquorum.interface import BitquorumError, ConfigError, DataError, InputError, Method, NoEffectWarning
from bitquorum.kernels import bfloat16_pays, memory_format
from bitquorum.muon import Muon
from bitquorum.objective import Objective, Reduce, Step
from bitquorum.quantizers import Quantizer
from bitquorum.registry import digest

Optimizer = Literal["sgd", "muon", "adamw", "adam"]
Schedule = Literal["onecycle", "cosine", "constant"]
Precision = Literal["auto", "float32", "bfloat16"]
_RESIDENT = 8 << 30  # bytes of images that a GPU keeps in its own memory


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Tell a listener where a training stands.

    Attributes:
        step: Steps done.
        steps: Steps in all.
        values: Mean of each logged number over the steps since the last report that computed it: `loss`, one per term
            that has a weight, `lr`.
        seconds_left: Estimate.
    """

    step: int
    steps: int
    values: dict[str, float]
    seconds_left: float


@final
@dataclass(frozen=True, kw_only=True)
class Trainer(Method):
    """Fit an ensemble to an image set.

    Attributes:
        epochs: Passes over the data; none leaves the ensemble as it is, but for its calibration.
        batch_size: Examples per step, over all processes.
        optimizer: `sgd` (Nesterov momentum 0.9), `muon` (`bitquorum.muon.Muon`), `adamw` or `adam`.
        lr: Peak learning rate; with `muon` of the convolutions, and of all else twice this.
        weight_decay: Of layer weights; norms, biases, ranges and noise scales get none, nor do convolutions under
            `muon`, which keeps their norms.
        schedule: `onecycle` (linear up over `warmup`, cosine down), `cosine` or `constant`.
        warmup: Share of the steps of the rise.
        ema: Decay of the averaged weights that are returned; 0 turns averaging off.
        clip: Largest gradient norm; 0 for none.
        augment: Random changes of the training images.
        precision: `bfloat16` autocasts; `auto` does so on devices where it pays (see `kernels.bfloat16_pays`).
        channels_last: Memory layout of images and convolutions, but for networks with strided 1x1 convolutions of few
            channels (see `kernels.memory_format`).
        calibration: Training images that set the first activation ranges: the first ones, or a sample that is balanced
            over the classes where those lack one; 0 keeps the guesses.
        checkpoint_seconds: Time between checkpoints.
        log_every: Steps between reports.
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: Optimizer = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    schedule: Schedule = "onecycle"
    warmup: float = 0.25
    ema: float = 0.0
    clip: float = 0.0
    augment: Augment = field(default_factory=Augment)
    precision: Precision = "auto"
    channels_last: bool = True
    calibration: int = 256
    checkpoint_seconds: float = 60.0
    log_every: int = 20

    def __post_init__(self) -> None:
        choices = {"optimizer": Optimizer, "schedule": Schedule, "precision": Precision}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                raise InputError(f"expected {name} among {', '.join(get_args(choice))}, got {getattr(self, name)!r}")
        if min(self.batch_size, self.log_every) < 1 or min(self.epochs, self.calibration) < 0:
            raise InputError(
                "expected batch_size and log_every of at least 1 and epochs and calibration of at least 0, got "
                f"{self.batch_size}, {self.log_every}, {self.epochs} and {self.calibration}"
            )
        amounts = self.lr > 0 and self.weight_decay >= 0 and self.clip >= 0
        if not (amounts and 0 <= self.ema < 1 and 0 <= self.warmup < 1):
            raise InputError(
                "expected lr > 0, weight_decay and clip >= 0, ema and warmup in [0, 1), got "
                f"{self.lr}, {self.weight_decay}, {self.clip}, {self.ema} and {self.warmup}"
            )

    def __call__(
        self,
        ensemble: Ensemble,
        data: ImageSet,
        objective: Objective,
        *,
        seed: SupportsIndex = 0,
        checkpoint: Path | str | None = None,
        report: Callable[[Progress], None] | None = None,
        device: torch.device | str = "cpu",
    ) -> Ensemble:
        """Train in place and return the ensemble, with averaged weights when `ema` asks for them.

        Args:
            ensemble: Moved to `device`.
            data: Training images.
            objective: Loss.
            seed: Of order, augmentation and noise.
            checkpoint: File to resume from and to save to; every process may name the same one.
            report: Called every `log_every` steps and at the end, in the first process.
            device: Where to train.

        Raises:
            InputError: if the data hold fewer images than a batch or more classes than a member has logits, no
                parameter has a gradient, or the checkpoint is that of another training.
            DivergedError: if the loss is not finite.

        Warns:
            NoEffectWarning: if no weight of a layer has a gradient.
        """
        training = _Training(self, ensemble, data, objective, operator.index(seed), torch.device(device))
        return training.run(None if checkpoint is None else Path(checkpoint), report)

    def check(self, data: ImageSet) -> None:
        """Refuse data that do not fill a batch.

        Raises:
            InputError: if they do not.
        """
        if len(data) < self.batch_size:
            raise InputError(
                f"expected at least one batch of {self.batch_size} images, got {len(data)}; lower batch_size"
            )

    def lr_at(self, progress: float) -> float:
        """Return the learning rate at a share of the training."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        if progress < self.warmup:
            return self.lr * (0.04 + 0.96 * progress / self.warmup)
        fall = (progress - self.warmup) / (1 - self.warmup)
        return self.lr * (1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * fall)))


def _moves_weights(ensemble: Ensemble) -> bool:
    weights = [parameter for parameter in ensemble.parameters() if parameter.dim() > 1]
    return not weights or any(weight.requires_grad for weight in weights)


class DivergedError(BitquorumError):
    """Report a loss that is not finite."""


class _Training:
    """Hold the state of one training."""

    def __init__(
        self,
        trainer: Trainer,
        ensemble: Ensemble,
        data: ImageSet,
        objective: Objective,
        seed: int,
        device: torch.device,
    ) -> None:
        if not isinstance(ensemble, Ensemble):
            raise InputError(
                f"expected an ensemble, got {type(ensemble).__name__}; use `bitquorum.Ensemble([network])`"
            )
        trainer.check(data)
        if trainer.epochs and not any(parameter.requires_grad for parameter in ensemble.parameters()):
            raise InputError(
                "expected weights to train, got an ensemble of which none has a gradient, as an evaluation leaves it; "
                "call its requires_grad_() first"
            )
        if trainer.epochs and not _moves_weights(ensemble):
            warnings.warn(
                "no layer's weight has a gradient: the training moves ranges, norm layers and biases alone; call "
                "requires_grad_() of the ensemble if that is not meant",
                NoEffectWarning,
                stacklevel=3,
            )
        self.trainer, self.objective = trainer, objective
        self.data = data.to(device) if device.type == "cuda" and data.images.nbytes <= _RESIDENT else data
        self.seed, self.device = seed, device
        self.layout = memory_format(ensemble, channels_last=trainer.channels_last)
        self.ensemble = ensemble.to(device=device, memory_format=self.layout)  # type: ignore[call-overload]
        self.rank, self.world = _processes()
        self.per_epoch = len(data) // trainer.batch_size
        self.steps = trainer.epochs * self.per_epoch
        self.step = 0
        self.order = self.partners = torch.empty(0, dtype=torch.int64)
        self.ordered = -1
        self.memory: dict[str, Tensor] = {}
        self.optimizer = _optimizer(trainer, self.ensemble)
        self.captured = self._capture()
        self.average: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}
        self.counted: dict[str, int] = {}

    def run(self, checkpoint: Path | None, report: Callable[[Progress], None] | None) -> Ensemble:
        """Train from the checkpoint, or from the start, to the end."""
        if checkpoint is not None:
            _ = self._mark  # settings that no file can hold are refused now, not when the first is written
        if checkpoint is not None and checkpoint.exists():
            self._load(checkpoint)
        else:
            self._begin()
        self.ensemble.train()
        started = saved = time.monotonic()
        first = self.step
        for batch in self._batches():
            self._update(batch)
            now = time.monotonic()
            if report and self.rank == 0 and (self._due() or self.step == self.steps):
                left = (now - started) / (self.step - first) * (self.steps - self.step)
                report(Progress(step=self.step, steps=self.steps, values=self._drain(), seconds_left=left))
            if checkpoint is not None and now - saved > self.trainer.checkpoint_seconds:
                self._save(checkpoint)
                saved = now
        self._check_weights()
        if checkpoint is not None:
            self._save(checkpoint)
        if self.average:
            self.ensemble.load_state_dict(self.average)
        return self.ensemble.eval()

    def _begin(self) -> None:
        count = min(self.trainer.calibration, len(self.data))
        if count:
            sample = self._calibration(count).batch(torch.arange(count), self.device)
            with rng.draw(rng.derive(self.seed, "calibration"), sample.examples):
                for member in self.ensemble.members:
                    calibrate(member, self._laid_out(sample.images))
        if self.trainer.ema:
            self.average = {name: value.clone() for name, value in self.ensemble.state_dict().items()}

    def _calibration(self, count: int) -> ImageSet:
        first = self.data.take(count)
        if len(first.labels.unique()) == len(self.data.labels.unique()):
            return first
        return self.data.take(count, seed=rng.derive(self.seed, "calibration images"))  # sorted by class, say

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield this process's part of every batch that is left, augmented.

        Images, labels and examples, and where images are mixed also the other labels and the images' own shares.
        """
        size, augment = self.trainer.batch_size, self.trainer.augment
        while self.step < self.steps:
            epoch, place = divmod(self.step, self.per_epoch)
            seed = rng.derive(self.seed, "augment", epoch)
            if self.ordered != epoch:
                self.order, self.ordered = self._order(epoch), epoch
                self.partners = augment.partners(self.data.index.cpu(), seed) if augment.cutmix else self.order
            positions = self.order[place * size : (place + 1) * size].tensor_split(self.world)[self.rank]
            batch = self.data.batch(positions, self.device)
            images = augment(batch.images, batch.examples, seed)
            if not augment.cutmix:
                yield self._laid_out(images), batch.labels, batch.examples
                continue
            others = self.data.batch(self.partners[positions], self.device)
            images, share = augment.mix(images, augment(others.images, others.examples, seed), batch.examples, seed)
            yield self._laid_out(images), batch.labels, batch.examples, others.labels, share

    def _order(self, epoch: int) -> Int[Tensor, "images"]:
        generator = torch.Generator().manual_seed(rng.derive(self.seed, "order", epoch))
        return torch.randperm(len(self.data), generator=generator)

    def _update(self, batch: tuple[Tensor, ...]) -> None:
        progress = self.step / self.steps
        rate = self.trainer.lr_at(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.captured is not None:
            images, labels, examples, *mixed = batch
            examples = examples + (self.step << 32)  # a record holds the seed fixed: the noise is keyed by both
            loss, values = self.captured((images, labels, examples, *mixed), self.objective.weights_at(progress))
        else:
            seed = rng.derive(self.seed, "step", self.step)
            self.optimizer.zero_grad(set_to_none=True)
            with rng.torch_seed(rng.derive(seed, "torch", self.rank)):  # of dropout and the like
                loss, values = self._refusing_nan(batch, progress=progress, seed=seed)
            self._reduce_gradients(len(batch[0]))
        if self.trainer.clip:
            nn.utils.clip_grad_norm_(self.ensemble.parameters(), self.trainer.clip)
        with self._autocast():  # reaches products of matrices alone, which only `muon` has
            self.optimizer.step()
        self.step += 1
        self._average()
        self._log({"loss": loss, **values, "lr": torch.tensor(rate)})

    def _refusing_nan(
        self, batch: tuple[Tensor, ...], *, progress: float, seed: int
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Pass a batch; where a term refuses what diverged weights say, tell of these."""
        try:
            return self._pass(batch, progress=progress, seed=seed)
        except InputError as error:
            with torch.no_grad():
                finite = bool(self.ensemble(batch[0]).isfinite().all())
            if finite:
                raise
            raise DivergedError(
                f"expected finite logits, got NaN or infinity before step {self.step}; lower lr or set clip"
            ) from error

    def _pass(
        self,
        batch: Sequence[Tensor],
        weights: Sequence[float | Tensor] | None = None,
        *,
        progress: float,
        seed: int,
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """Return the loss of a batch and the values of its terms; gradients lie in the parameters."""
        images, labels, examples, *mixed = batch
        if self.objective.needs_image_gradient:
            images = images.requires_grad_()
        step = Step(
            ensemble=self.ensemble,
            images=images,
            labels=labels,
            examples=examples,
            progress=progress,
            seed=seed,
            memory=self.memory,
            reduce=_Mean(len(images) / self.trainer.batch_size) if self.world > 1 else Reduce(),
            mixed=(mixed[0], mixed[1]) if mixed else None,
            classes=len(self.data.classes),
        )
        with self._autocast():
            loss, values = self.objective(step, weights)
        if loss.requires_grad:  # not so while every term waits for its warm-up
            loss.backward()
        return loss.detach(), values

    def _capture(self) -> CapturedStep | None:
        """Return a step to be recorded, where one can be."""
        if self.world > 1 or not fits_capture(self.ensemble, self.objective, self.device):
            return None
        body = partial(self._pass, progress=1.0, seed=rng.derive(self.seed, "captured"))
        return CapturedStep(body, [p for p in self.ensemble.parameters() if p.requires_grad])

    def _reduce_gradients(self, images: int) -> None:
        """Average gradients over the processes, weighted by their share of the batch."""
        if self.world == 1 or all(p.grad is None for p in self.ensemble.parameters()):
            return
        share = images * self.world / self.trainer.batch_size
        gradients = [p.grad for p in self.ensemble.parameters() if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).mul_(share / self.world)
        dist.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        # Batches are normalized within a process; the running statistics are those of all processes.
        for name, buffer in self.ensemble.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                dist.all_reduce(buffer.div_(self.world))

    def _average(self) -> None:
        decay = min(self.trainer.ema, (1 + self.step) / (10 + self.step))  # short memory at the start
        if not self.average:
            return
        state = self.ensemble.state_dict()
        moving = [name for name, value in state.items() if value.is_floating_point()]
        torch._foreach_lerp_([self.average[name] for name in moving], [state[name] for name in moving], 1 - decay)
        fixed = sorted(state.keys() - set(moving))
        if fixed:
            torch._foreach_copy_([self.average[name] for name in fixed], [state[name] for name in fixed])

    def _log(self, values: dict[str, Tensor | float]) -> None:
        for name, value in values.items():
            # Added up where it lies: to ask a GPU for a number at every step would stop it.
            self.totals[name] = self.totals.get(name, torch.zeros(())) + torch.as_tensor(value).detach()
            self.counted[name] = self.counted.get(name, 0) + 1
        if self._due() or self.step == self.steps:
            self._check_finite()
            if self.rank:
                self._drain()

    def _check_finite(self) -> None:
        loss = float(self.totals.get("loss", 0.0))
        if not math.isfinite(loss):
            raise DivergedError(f"expected a finite loss, got {loss} before step {self.step}; lower lr or set clip")

    def _check_weights(self) -> None:
        """Refuse weights that an update has spoilt, which the loss shows one step later: no checkpoint holds them."""
        for name, weight in self.ensemble.named_parameters():
            if not bool(weight.isfinite().all()):
                raise DivergedError(
                    f"expected finite weights, got NaN or infinity in {name} after step {self.step}; lower lr or set "
                    "clip"
                )

    def _due(self) -> bool:
        return self.step % self.trainer.log_every == 0

    def _drain(self) -> dict[str, float]:
        values = {name: float(total) / self.counted[name] for name, total in self.totals.items()}
        self.totals, self.counted = {}, {}
        return values

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=self.layout) if images.dim() == 4 else images

    def _autocast(self) -> AbstractContextManager[object]:
        low = self.trainer.precision == "bfloat16" or (self.trainer.precision == "auto" and bfloat16_pays(self.device))
        return torch.autocast(self.device.type, torch.bfloat16) if low else nullcontext()

    def _save(self, path: Path) -> None:
        if self.rank:
            return
        self._check_finite()
        self._check_weights()
        state = {f"model.{name}": value for name, value in self.ensemble.state_dict().items()}
        state |= {f"average.{name}": value for name, value in self.average.items()}
        state |= {f"memory.{name}": value for name, value in self.memory.items()}
        state |= {f"total.{name}": value for name, value in self.totals.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": torch.as_tensor(slot) for name, slot in slots.items()}
        counts = {"step": self.step, "steps": self.steps, "counted": self.counted, "seed": self.seed}
        save_tensors(path, state, {"state": json.dumps(counts), "mark": self._mark})

    @cached_property
    def _mark(self) -> str:
        """Return what tells this training from others: settings, objective, quantizers, images by name and number."""
        settings = replace(self.trainer, checkpoint_seconds=60.0, log_every=20)  # these two may change on the way
        seen = hashlib.sha256(f"{digest(settings)} {self.data.name}".encode())
        with suppress(ConfigError):  # a term of one's own may hold what no table can
            seen.update(digest(self.objective).encode())
        for module in self.ensemble.modules():
            if isinstance(module, Quantizer):  # its weights do not say how many bits they have, nor which noise
                seen.update(f"{module.bits} {module.grid} {module.learned}".encode())
                with suppress(ConfigError):
                    seen.update(digest(module.law).encode())
        for part in (self.data.index, self.data.labels):
            seen.update(part.cpu().numpy().tobytes())
        return seen.hexdigest()[:16]

    def _load(self, path: Path) -> None:
        state, metadata = load_tensors(path, str(self.device))
        try:
            counts = json.loads(metadata["state"])
            self._accept(path, state, counts, metadata.get("mark", self._mark))  # earlier versions wrote none
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            reason = str(error).splitlines()[0]
            raise DataError(
                f"expected a checkpoint of this training at {path}, got another file ({reason}); remove it"
            ) from error

    def _accept(self, path: Path, state: dict[str, Tensor], counts: dict[str, Any], mark: str) -> None:
        if (counts["steps"], counts["seed"]) != (self.steps, self.seed):
            raise InputError(
                f"{path}: expected a checkpoint of a training of {self.steps} steps with seed {self.seed}, got "
                f"{counts['steps']} steps with seed {counts['seed']}; remove it to begin anew"
            )
        if mark != self._mark:
            raise InputError(
                f"{path}: expected a checkpoint of this training, got one with other settings, another objective, "
                "other quantizers or other images; remove it to begin anew, or name another file"
            )
        part = partial(_under, state)
        shapes = {name: value.shape for name, value in self.ensemble.state_dict().items()}
        if {name: value.shape for name, value in part("model.").items()} != shapes:  # torch would load those that fit
            raise ValueError("weights of other names or shapes")
        self.ensemble.load_state_dict(part("model."))
        self.average, self.memory = part("average."), part("memory.")
        self.totals = part("total.")
        self.step, self.counted = counts["step"], counts["counted"]
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in part("optimizer.").items():
            index, _, slot = name.partition(".")
            slots.setdefault(int(index), {})[slot] = value
        self.optimizer.load_state_dict({"state": slots, "param_groups": self.optimizer.state_dict()["param_groups"]})


class _Mean(Reduce):
    """Average over all processes, each by its share of the batch."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        total = self.share * x
        dist.all_reduce(total)
        return total


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _processes() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _optimizer(trainer: Trainer, ensemble: Ensemble) -> torch.optim.Optimizer:
    ranges = {
        id(parameter)
        for module in ensemble.modules()
        if isinstance(module, Quantizer)
        for parameter in module.parameters()
    }
    decayed, free = [], []
    for parameter in ensemble.parameters():
        (free if parameter.dim() < 2 or id(parameter) in ranges else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": trainer.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    if trainer.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=trainer.lr, momentum=0.9, nesterov=True)
    if trainer.optimizer == "muon":
        return Muon(groups, lr=trainer.lr)
    kind = torch.optim.AdamW if trainer.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=trainer.lr)
