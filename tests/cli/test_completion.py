"""``halfbyte completion``: what the shells themselves complete with the scripts."""

import shutil
import subprocess

import pytest

from halfbyte.cli import COMMANDS, main


def script(shell: str, capsys) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


def in_bash(completion: str, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = f"""{completion}
COMP_WORDS=(halfbyte {quoted}); COMP_CWORD={len(words)}
_halfbyte
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    found = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert not found.stderr
    return found.stdout.split()


def test_bash(capsys):
    completion = script("bash", capsys)
    assert in_bash(completion, "tra") == ["train"]
    assert set(COMMANDS) <= set(in_bash(completion, ""))
    assert in_bash(completion, "train", "--quant-") == ["--quant-search"]
    assert in_bash(completion, "train", "--data", "x", "--quant", "") == ["nf4", "fp4", "none"]
    assert "--no-double-quant" in in_bash(completion, "train", "--no")
    assert in_bash(completion, "train", "--data", "") == []  # bash's own: files
    assert in_bash(completion, "plan", "--lora-d") == []  # an option of another command


def test_fish(capsys):
    completion = script("fish", capsys)
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    asked = f"{completion}\ncomplete -C 'halfbyte train --quant '"
    found = subprocess.run(["fish", "-c", asked], capture_output=True, text=True, check=True)
    assert {"nf4", "fp4", "none"} <= set(found.stdout.split())


def test_zsh(capsys, tmp_path):
    completion = script("zsh", capsys)
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed")
    path = tmp_path / "_halfbyte"
    path.write_text(completion)
    subprocess.run(["zsh", "-n", str(path)], check=True)


def test_an_unknown_shell(capsys):
    assert main(["completion", "csh"]) == 2
    assert "'bash', 'zsh' or 'fish'" in capsys.readouterr().err
