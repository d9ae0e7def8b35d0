"""Compare the step of a training: float or low-bit, with and without the input-gradient penalty, M members."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from bitquorum import kernels, rng
from bitquorum.benchmark.timing import Contender, Sizes, Workload, fastest
from bitquorum.capture import CapturedStep, Values
from bitquorum.conversion import Policy
from bitquorum.ensemble import Ensemble
from bitquorum.objective import InputGradient, MemberCrossEntropy, Objective, Reduce, Step
from bitquorum.quantizers import Deterministic, Law, Logistic, SmoothRounding
from bitquorum.zoo import ResNet18, SmallResNet


def training(sizes: Sizes) -> Iterator[Workload]:
    """Yield the step of a small network without and with the penalty, and that of a ResNet-18 without.

    A step is the objective of one batch and its backward pass.
    """
    fused = fastest(sizes.device) == "compiled"
    for penalty in (False, True):
        contenders = [training_step("float", sizes, None, penalty=False)]
        if fused:
            contenders.append(training_step("float, plain", sizes, None, penalty=False, mode="eager"))
        if penalty:
            contenders.append(training_step("float with penalty", sizes, None, penalty=True))
        tail = " with penalty" if penalty else ""
        for law in (Logistic(), SmoothRounding()):
            label = f"SQ {type(law).__name__}{tail}"
            contenders.append(training_step(f"{label}, plain", sizes, law, penalty=penalty, mode="eager"))
            if fused:
                contenders.append(training_step(label, sizes, law, penalty=penalty))
        name = f"SQ SmoothRounding{tail}"
        for recorded in (False, True) if torch.device(sizes.device).type == "cuda" else (False,):
            if recorded:
                contenders.append(training_step("float, recorded", sizes, None, penalty=False, recorded=True))
                contenders.append(training_step(f"{name}, recorded", sizes, law, penalty=penalty, recorded=True))
            contenders += [
                training_step(
                    f"{name}, M = {count}{', recorded' if recorded else ''}",
                    sizes,
                    law,
                    penalty=penalty,
                    members=count,
                    recorded=recorded,
                )
                for count in sizes.members
                if count > 1
            ]
        yield Workload(name=f"training{tail}", contenders=tuple(contenders), warmup=3)
    large = ResNet18(width=64 if sizes.widths[0] > 4 else sizes.widths[0])
    contenders = [training_step("float", sizes, None, penalty=False, build=large)]
    for count in sizes.members:
        label = "SQ SmoothRounding" + (f", M = {count}" if count > 1 else "")
        contenders.append(training_step(label, sizes, SmoothRounding(), penalty=False, members=count, build=large))
    yield Workload(name="training, ResNet-18", contenders=tuple(contenders), most=5)


def training_step(
    name: str,
    sizes: Sizes,
    law: Law | None,
    *,
    penalty: bool,
    members: int = 1,
    mode: kernels.Mode = "compiled",
    recorded: bool = False,
    build: SmallResNet | ResNet18 | None = None,
) -> Contender:
    """Return the step of so many members under a noise law of activations; `None` for float members.

    Args:
        name: Of the contender.
        sizes: Of network and batch.
        law: Of the activations' noise; weights are rounded to nearest.
        penalty: Whether the objective has an input-gradient term.
        members: Number of members with separate weights.
        mode: Of the kernels.
        recorded: Whether the step is a CUDA graph, as `Trainer` has it.
        build: The network; a small one of the sizes' widths when omitted.
    """
    with rng.torch_seed(0):
        build = build or SmallResNet(widths=sizes.widths, activation="relu")
        networks = [build(classes=10, shape=(3, 32, 32)) for _ in range(members)]
    policy = None if law is None else _policy(sizes.bits, law)
    ensemble = Ensemble.build(networks, [policy] * members).to(sizes.device).train()
    ensemble = ensemble.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    objective = Objective(terms=(MemberCrossEntropy(), *((InputGradient(warmup=0.0),) if penalty else ())))
    return Contender(name=name, run=_step(ensemble, objective, sizes, mode, recorded=recorded))


def _policy(bits: int, law: Law) -> Policy:
    return Policy(weight_bits=bits, activation_bits=bits, weight_law=Deterministic(), activation_law=law)


def _step(
    ensemble: Ensemble, objective: Objective, sizes: Sizes, mode: kernels.Mode, *, recorded: bool
) -> Callable[[], object]:
    examples = torch.arange(sizes.batch, device=sizes.device)
    images = rng.uniform(0, examples, 3 * 32 * 32).view(-1, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    kind = torch.device(sizes.device).type
    mode = fastest(sizes.device) if mode == "compiled" else mode

    def body(tensors: Sequence[Tensor], weights: Sequence[Tensor] | None) -> tuple[Tensor, Values]:
        images, labels, examples = tensors
        batch = Step(
            ensemble=ensemble,
            images=images.detach().requires_grad_(objective.needs_image_gradient),
            labels=labels,
            examples=examples,
            progress=1.0,
            seed=0,
            memory={},
            reduce=Reduce(),
        )
        cast = torch.autocast(kind, torch.bfloat16) if sizes.precision == "bfloat16" else nullcontext()
        with cast:
            loss, values = objective(batch, weights)
        loss.backward()
        return loss.detach(), values

    captured = CapturedStep(body, list(ensemble.parameters())) if recorded else None

    def step() -> None:
        batch = (images, examples % 10, examples)
        with kernels.use(mode):
            if captured is not None:
                captured(batch, objective.weights_at(1.0))
            else:
                body(batch, None)
                ensemble.zero_grad(set_to_none=True)

    return step
