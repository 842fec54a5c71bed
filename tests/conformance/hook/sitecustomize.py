"""What the conformance suite sees of a run besides its folder. Python imports this file when it starts (PYTHONPATH).

Each rank writes CONFORMANCE["ledger"]/rank-<n>.jsonl: batches dealt by data loaders, backward passes, optimizer steps with a
checksum of the weights, parameters with their first gradient, files touched below the output folder. It also strikes where
it is told to: a signal to itself after an optimizer step or in the middle of a save, a NaN in one rank's forward pass."""

import json
import os
import sys

PLAN = json.loads(os.environ.get("CONFORMANCE", "null"))
RANK = int(os.environ.get("RANK", "0"))


def install() -> None:
    import gc
    import itertools
    import threading
    import zlib

    import safetensors.torch
    import torch
    from torch import nn
    from torch.optim import optimizer as optim
    from torch.utils.data import dataloader

    process = os.getpid()
    ledger = os.open(os.path.join(PLAN["ledger"], f"rank-{RANK}.jsonl"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    output = os.path.join(os.path.abspath(PLAN["output"]), "")
    strike = PLAN.get("strike", {})
    struck = strike.get("rank", 0) == RANK
    counting = threading.RLock()
    seen = {"steps": 0, "backward": 0, "touched": 0}

    def note(event: str, **values) -> None:
        os.write(ledger, (json.dumps({"event": event, **values}) + "\n").encode())

    def hit() -> None:
        note("strike", at=seen["steps"])
        os.kill(process, strike["signal"])

    # -- data loaders: which keys, in the order in which the training process asks for them

    numbers: dict[int, tuple[int, object]] = {}  # holds the object, so that its id is not given to another
    next_index = dataloader._BaseDataLoaderIter._next_index

    def plain(key: object) -> object:
        return [plain(k) for k in key] if isinstance(key, list | tuple) else int(key)

    def recorded_next_index(self) -> object:
        keys = next_index(self)
        data = numbers.setdefault(id(self._dataset), (len(numbers), self._dataset))[0]
        try:
            size = len(self._dataset)
        except TypeError:
            size = None
        try:
            note("fetch", data=data, size=size, keys=plain(keys if isinstance(keys, list | tuple) else [keys]))
        except (TypeError, ValueError):
            note("fetch", data=data, size=size, keys=None)
        return keys

    dataloader._BaseDataLoaderIter._next_index = recorded_next_index

    # -- backward passes, optimizer steps, gradients

    backward = torch.Tensor.backward

    def recorded_backward(self, *args, **options):
        note("backward")
        seen["backward"] += 1
        return backward(self, *args, **options)

    torch.Tensor.backward = recorded_backward

    order: dict[int, int] = {}  # optimizers in the order of their first steps
    waiting: dict[int, str] = {}  # parameters without a gradient so far

    def names_of(parameters: list) -> dict[int, str]:
        wanted, names = {id(p) for p in parameters}, {}
        for module in [o for o in gc.get_objects() if isinstance(o, nn.Module)]:
            if isinstance(module, nn.parallel.DistributedDataParallel):
                continue
            for name, parameter in module.named_parameters():
                if id(parameter) in wanted and len(name) > len(names.get(id(parameter), "")):
                    names[id(parameter)] = name
        return names

    def of(optimizer) -> list:
        return [p for group in optimizer.param_groups for p in group["params"]]

    def before(optimizer, args, options) -> None:
        if id(optimizer) not in order:
            order[id(optimizer)] = len(order)
            names = names_of(of(optimizer))
            waiting.update({id(p): names.get(id(p), f"a parameter of shape {tuple(p.shape)}") for p in of(optimizer)})
            note("parameters", names=[waiting[id(p)] for p in of(optimizer)])
        moved = [p for p in of(optimizer) if id(p) in waiting and p.grad is not None and bool(p.grad.any())]
        if moved:
            note("gradient", names=[waiting.pop(id(p)) for p in moved])

    def after(optimizer, args, options) -> None:
        checksum = 0
        for parameter in of(optimizer):
            checksum = zlib.crc32(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), checksum)
        number = order.get(id(optimizer), 0)
        seen["steps"] += number == 0
        note("step", optimizer=number, step=seen["steps"], checksum=checksum)
        if struck and number == 0 and strike.get("step") == seen["steps"]:
            hit()

    optim.register_optimizer_step_pre_hook(before)
    optim.register_optimizer_step_post_hook(after)

    # -- files below the output folder

    def touch(path: object, kind: str) -> None:
        if isinstance(path, int) or path is None or os.getpid() != process:
            return
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith(output):
            return
        note("touch", path=path.removeprefix(output), kind=kind, at=seen["steps"])
        if struck and "touch" in strike and seen["steps"] == strike["at"]:
            with counting:  # checkpoints may be written by threads
                if seen["touched"] == strike["touch"]:
                    hit()
                seen["touched"] += 1

    def audit(event: str, args: tuple) -> None:
        if event == "open":
            path, mode, flags = args
            writes = set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            touch(path, "write" if writes else "read")
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            touch(args[0], "folder")
        elif event == "os.rename":
            touch(args[1], "write")

    sys.addaudithook(audit)

    def announced(save, position: int):  # these two open their files below Python, where no audit event tells of it
        def wrapped(*args, **options):
            path = args[position] if len(args) > position else options.get("filename", options.get("f"))
            touch(path if isinstance(path, str | os.PathLike) else None, "write")
            result = save(*args, **options)
            touch(path if isinstance(path, str | os.PathLike) else None, "read")
            return result

        return wrapped

    torch.save = announced(torch.save, 1)
    safetensors.torch.save_file = announced(safetensors.torch.save_file, 1)

    # -- a NaN on one rank

    if PLAN.get("nan", {}).get("rank") == RANK:
        once = itertools.count()

        def poison(module, inputs, output):
            ready = seen["backward"] >= PLAN["nan"]["backward"] and module.training and torch.is_grad_enabled()
            own = any(True for _ in module.parameters(recurse=False))
            if ready and own and isinstance(output, torch.Tensor) and output.is_floating_point() and not next(once):
                note("poisoned")
                return output * torch.nan

        nn.modules.module.register_module_forward_hook(poison)


if PLAN and "-m" not in sys.orig_argv:  # not in launchers
    install()
