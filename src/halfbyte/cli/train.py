"""``halfbyte train [CONFIG.yaml]``: fine-tune a model on your data."""

import dataclasses
import sys

from halfbyte.cli.next_commands import after_training, show_next
from halfbyte.cli.several_gpus import start_processes, starts_processes
from halfbyte.cli.startup import import_transformers
from halfbyte.config.command_line import Command, invocation, results
from halfbyte.config.reading import load_config
from halfbyte.config.schema import TrainConfig
from halfbyte.runtime.distributed import claim_gpu, rank_of_process

COMMAND = Command(
    "train",
    TrainConfig,
    about="Fine-tune a model on your data. Options can be given in a YAML file, under the same "
    "names or those of axolotl, LLaMA-Factory and TRL; the command line takes precedence.",
    example="halfbyte train --model model.gguf --data train.jsonl --output out",
    positional=("config",),
)


def main(argv: list[str]) -> None:
    """Run the command."""
    words = COMMAND.words(argv)
    file = words.positional.get("config") or words.given.pop("config", None)
    config, notes = load_config(file, words.given, problems=words.problems)
    config.require_held_out()
    if starts_processes(config):
        raise SystemExit(start_processes(config, ["train", *argv]))

    first = rank_of_process()[0] == 0
    if config.device != "cpu":
        claim_gpu()
    import_transformers(gpu=config.device != "cpu")
    from halfbyte.report import open_report, show
    from halfbyte.report.held_out import HELD_OUT_NAME
    from halfbyte.runtime.signals import first_signal
    from halfbyte.train.run import train
    from halfbyte.train.stopping import StopRequest

    if first and sys.stderr.isatty():
        print(f"To watch it: {invocation('watch', str(config.output))}", file=sys.stderr)
    stop = StopRequest()
    with results(as_json=words.json and first) as result:
        with first_signal(stop.on_signal), open_report(config.output) as report:
            for note in notes:
                report.note(note)
            trained = train(config, report, stop)
        if not first:
            return
        held_out = str(trained.adapter_dir / HELD_OUT_NAME) if config.eval_split else None
        data = config.eval_data or held_out
        commands, warnings = after_training(
            config.model, trained.adapter_dir, revision=config.revision, data=data
        )
        show_next("The adapter has been written. To try it:", commands[:1])
        evaluate = "" if data is None else "evaluate, "
        show_next(f"To {evaluate}merge, export or serve it:", commands[1:])
        for warning in warnings:
            show.paragraph(warning)
        result |= dataclasses.asdict(trained)
