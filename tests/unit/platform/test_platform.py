"""Choosing the platform, what it says of itself, and joining a world."""

import sys
import textwrap

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from megatron_m3.config import ParallelConfig
from megatron_m3.errors import ArtifactError, ConfigError
from megatron_m3.platform.distributed import check_world_size, on_first_process
from megatron_m3.platform.platform import local_gpu
from tests.launcher import ROOT, run_command

ON_CPU = not torch.cuda.is_available()


def in_new_process(code, path=()):
    paths = "".join(f"sys.path.insert(0, {str(folder)!r})\n" for folder in [ROOT, *path])
    return run_command([sys.executable, "-c", f"import sys\n{paths}{textwrap.dedent(code)}"], expect=None)


def test_unrelated_apex_is_refused_by_name(tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("class WebToolkit: pass\n")
    done = in_new_process(
        """
        from megatron_m3.errors import exit_on_user_error
        from megatron_m3.platform import select
        exit_on_user_error(select)
        """,
        [tmp_path],
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: apex: ")
    assert "pip uninstall apex" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_process_takes_the_gpu_of_its_rank():
    assert [local_gpu(str(rank), 4) for rank in range(4)] == [0, 1, 2, 3]
    for rank in ("4", "-1", "first"):
        with pytest.raises(ConfigError, match=f"LOCAL_RANK={rank}: this process sees 4 GPUs"):
            local_gpu(rank, 4)


@pytest.mark.skipif(not ON_CPU, reason="the stand-ins are for machines without CUDA")
def test_transformer_engine_counts_as_absent_on_the_cpu(tmp_path):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    done = in_new_process(
        """
        from megatron_m3.platform import report, select
        select()
        from megatron.core.extensions.transformer_engine import HAVE_TE
        assert not HAVE_TE
        from megatron.core.optimizer import Adam
        print(Adam.__module__, report()["backend"])
        """,
        [tmp_path],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.optim.adamw gloo"


@pytest.mark.skipif(not ON_CPU, reason="the stand-ins are for machines without CUDA")
def test_importing_megatron_core_first_is_our_bug():
    done = in_new_process("import megatron.core\nfrom megatron_m3.platform import select\nselect()")
    assert "must come before the first import of megatron.core" in done.stderr


def test_data_jobs_start_without_torch():
    done = in_new_process(
        """
        import importlib
        from launch.m3 import JOBS
        for job in JOBS["Data"]:
            importlib.import_module(job.module)
        import megatron_m3.data, megatron_m3.platform.progress, megatron_m3.references
        sys.exit("torch" in sys.modules)
        """
    )
    assert done.returncode == 0, done.stderr


def test_a_world_that_the_sizes_do_not_divide_is_refused():
    check_world_size(ParallelConfig(tensor=2, pipeline=2), 8)
    with pytest.raises(ConfigError, match=r"parallel\.tensor=2 x parallel\.pipeline=2 needs a multiple of 4"):
        check_world_size(ParallelConfig(tensor=2, pipeline=2), 6)


def test_gpus_are_counted():
    from megatron_m3.platform import count_gpus

    assert count_gpus() == torch.cuda.device_count()


def try_on_first(rank, folder):
    """Write what each of three actions, which the first process alone is to run, raises here."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)

    def refuse():
        raise ArtifactError("another run has it")

    for action in (lambda: (folder / "made").mkdir(), refuse, lambda: (folder / "absent" / "folder").mkdir()):
        try:
            on_first_process(action)
            told = "done"
        except (ArtifactError, OSError) as error:
            told = f"{type(error).__name__}: {error}"
        with (folder / str(rank)).open("a") as stream:
            print(told, file=stream)
    dist.destroy_process_group()


def test_what_stops_the_first_process_is_raised_on_all(tmp_path):
    torch.multiprocessing.spawn(try_on_first, (tmp_path,), nprocs=2)
    told = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    absent = f"FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path}/absent/folder'"
    assert told == [f"done\nArtifactError: another run has it\n{absent}\n"] * 2
