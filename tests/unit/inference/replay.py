"""What a CUDA graph does with a step, done on the CPU: the operations of one run again on the same tensors.

Nothing else of the step is run again. So what the host decided when the step was captured stays as it was, and numbers
that only Python holds stay what they were; a step that is no graph then gives other tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Operation = Callable[[], None]


def tensors_of(values):
    """The tensors among arguments or results."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Recorder(TorchDispatchMode):
    """Runs a step, keeps what runs it again, and puts back what it changed, as capturing runs nothing."""

    def __init__(self):
        super().__init__()
        self.operations: list[Operation] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def keep(self, tensors):
        self.before += [(tensor, tensor.clone()) for tensor in tensors]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        arguments = dict(zip((one.name for one in function._schema.arguments), args, strict=False)) | kwargs
        self.keep(tensors_of([value for one in function._schema.arguments for value in [arguments.get(one.name)]
                              if one.alias_info is not None and one.alias_info.is_write]))
        out = function(*args, **kwargs)
        results = tensors_of(out)

        def again():
            for result, new in zip(results, tensors_of(function(*args, **kwargs)), strict=True):
                if result.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():  # no view, nor in place
                    result.copy_(new)

        self.operations.append(again)
        return out

    def launch(self, kernel, grid, args, kwargs):
        """A Triton kernel, which is no operation of torch."""
        self.keep([one for one in args if isinstance(one, Tensor)])
        with torch.utils._python_dispatch._disable_current_modes():
            kernel[grid](*args, **kwargs)
        self.operations.append(lambda: kernel[grid](*args, **kwargs))

    def put_back(self):
        for tensor, before in reversed(self.before):
            tensor.copy_(before)


class Recorded:
    """A kernel whose launches the recorder that is at work also gets."""

    def __init__(self, kernel, at_work: list[Recorder]):
        self.kernel, self.at_work = kernel, at_work

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            if self.at_work:
                self.at_work[-1].launch(self.kernel, grid, args, kwargs)
            else:
                self.kernel[grid](*args, **kwargs)

        return launch


def record_steps(monkeypatch, module, kernels) -> list[int]:
    """Have ``steps.capture`` record; the returned list gets the number of operations of each step that is captured."""
    from megatron_m3.inference import steps

    at_work: list[Recorder] = []
    counts: list[int] = []
    for name in kernels:
        monkeypatch.setattr(module, name, Recorded(getattr(module, name), at_work))

    def capture(step):
        recorder = Recorder()
        at_work.append(recorder)
        with recorder:
            result = step()
        at_work.pop()
        recorder.put_back()
        result.fill_(torch.nan)
        counts.append(len(recorder.operations))

        def replay():
            for operation in recorder.operations:
                operation()
            return result

        return replay

    monkeypatch.setattr(steps, "capture", capture)
    return counts
