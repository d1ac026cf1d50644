"""Real hydra: a UserError in its task is one line and exit code 2; every other report stays hydra's."""

from __future__ import annotations

import pytest

SCRIPT = """
import hydra
from nxdt_nemo.errors import ConfigError

@hydra.main(version_base=None, config_path=None)
def main(cfg):
    raise {error}

if __name__ == "__main__":
    main()
"""


def said(done) -> str:
    """stderr without the notices of the start, such as the lane."""
    lines = done.stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("nxdt_nemo: "))


QUIET = ["hydra.output_subdir=null", "hydra.run.dir=.", "hydra/job_logging=none"]


@pytest.fixture
def script(tmp_path):
    def write(error: str) -> str:
        (tmp_path / "script.py").write_text(SCRIPT.format(error=error))
        return "script.py"

    return write


@pytest.mark.parametrize("more", [{}, {"HYDRA_FULL_ERROR": "1"}], ids=["short", "full"])
def test_a_user_error_is_one_line(ours, script, more) -> None:
    done = ours("run", script('ConfigError("is odd", place="model.x")'), *QUIET, **more)
    assert (done.returncode, done.stdout, said(done)) == (2, "", "nxdt-nemo: model.x: is odd\n")


def test_a_child_that_a_launcher_starts_leaves_in_silence(start, script) -> None:
    done = start(script('ConfigError("is odd")'), *QUIET, NXDT_NEMO="1", LOCAL_RANK="1", RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_other_errors_are_reported_by_hydra(start, ours, script) -> None:
    name = script("ValueError('a')")
    plain, run = start(name, *QUIET), ours("run", name, *QUIET)
    assert (run.returncode, run.stdout) == (plain.returncode, plain.stdout) == (1, "")
    assert said(run) == plain.stderr


def test_what_the_config_shows_is_said_before_the_script_starts(ours, tmp_path) -> None:
    (tmp_path / "conf.yaml").write_text("model:\n  num_attention_heads: 32\n  tensor_model_parallel_size: 3\n")
    (tmp_path / "script.py").write_text(
        "print('started')\nimport hydra\n"
        "@hydra.main(version_base=None, config_path='.', config_name='conf')\n"
        "def main(cfg):\n    pass\n"
        "if __name__ == '__main__':\n    main()\n"
    )
    done = ours("run", "script.py", *QUIET)
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert all(line.startswith("nxdt-nemo: conf.yaml: ") for line in lines)
    assert [line for line in lines if "model.tensor_model_parallel_size=3" in line and "32" in line]


@pytest.mark.parametrize(("value", "told"), [("true", "1"), ("null", "unset")])
def test_how_weights_are_rounded_is_handed_on(ours, tmp_path, value, told) -> None:
    (tmp_path / "conf.yaml").write_text(f"neuron:\n  stochastic_rounding: {value}\n")
    (tmp_path / "script.py").write_text(
        "import os\nprint(os.environ.get('NEURON_RT_STOCHASTIC_ROUNDING_EN', 'unset'))\nimport hydra\n"
        "@hydra.main(version_base=None, config_path='.', config_name='conf')\n"
        "def main(cfg):\n    pass\n"
        "if __name__ == '__main__':\n    main()\n"
    )
    done = ours("run", "script.py", *QUIET)
    assert (done.returncode, done.stdout) == (0, f"{told}\n"), done.stderr
