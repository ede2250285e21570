"""ifguide.extras: a missing optional package ends a command in one line that says what to install."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ifguide.extras import EXTRAS, advice

ROOT = Path(__file__).parents[2]
WITHOUT = "import sys; sys.modules.update(dict.fromkeys({blocked!r})); {code}"


def run_without(blocked: list[str], code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT.format(blocked=blocked, code=code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_every_extra_is_one_that_can_be_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(EXTRAS.values()) <= set(project["optional-dependencies"])


@pytest.mark.parametrize("module", ["detoxify", "s3fs.core"])
def test_a_package_of_an_extra_is_named_with_its_extra(module: str) -> None:
    extra = EXTRAS[module.split(".")[0]]
    assert f"pip install 'ifguide[{extra}]'" in str(advice(ModuleNotFoundError(name=module)))
    assert advice(ModuleNotFoundError(name="numpi")) is None


def test_commands_that_need_no_extra_start_without_any() -> None:
    done = run_without(list(EXTRAS), "from ifguide.cli import main; main(['pack_corpus', '--help'])")
    assert done.returncode == 0, done.stderr


def test_a_missing_package_ends_a_command_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "a", "toxic": true}\n{"text": "b", "toxic": false}\n')
    (tmp_path / "config.yaml").write_text(
        f"evaluate: {{check_data: ['{tmp_path}/texts.jsonl'], classifier: alt-profanity-check}}"
    )
    arguments = ["evaluate", "--check-classifier", "--config", str(tmp_path / "config.yaml")]
    for more, start in (
        ([], "  evaluate.classifier.name = alt-profanity-check: "),
        (["--no-preflight"], "ifguide evaluate: "),
    ):
        command = f"from ifguide.cli import main; sys.exit(main({[*arguments, *more]!r}))"
        done = run_without(["profanity_check"], command)
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith(f"{start}the package profanity_check is needed")
