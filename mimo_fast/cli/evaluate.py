"""`mimo-fast eval SET --data DIR`: a public set answered, and measured as MiMo-Audio's report."""

import argparse

from mimo_fast.arguments import suggestion
from mimo_fast.cli.common import adapter_of, load_model
from mimo_fast.cli.process import written
from mimo_fast.cli.reports import say
from mimo_fast.config import LMConfig
from mimo_fast.errors import EvaluationError
from mimo_fast.evaluation.items import EvaluationSet, Options
from mimo_fast.evaluation.plugins import KINDS, load_tools, with_model
from mimo_fast.evaluation.report import report_of, table_of, write_report
from mimo_fast.evaluation.run import Asked, evaluate, read_items
from mimo_fast.evaluation.sets import SETS


def run(args: argparse.Namespace) -> int:
    if args.list:
        print("\n\n".join(map(_described, SETS.values())))
        return 0
    asked = asked_of(args)
    items = read_items(asked, args.data, args.limit)
    tools = load_tools({kind: getattr(args, kind) for kind in KINDS})
    for measure in asked.measures:
        if missing := sorted(name for name in measure.needs if name not in tools.names):
            options = " and ".join(f"--{name}" for name in missing)
            say(f"{measure.name} will not be measured without {options}")

    def check(config: LMConfig) -> None:
        config.architecture.check_task(asked.task)
        if not config.is_trained(asked.task):
            say(f"warning: this model was not trained for {asked.task}: its answers mean little")

    model = load_model(args, max_batch=args.streams, check=check)
    asked = asked_of(args, adapter_of(model, args))
    tools, folder = with_model(tools, model), args.target
    evaluation = evaluate(model, asked, items, tools, folder, overwrite=args.overwrite)
    report = report_of(evaluation, tools.names, model.lm.device, args.limit)
    for path in write_report(folder, report):
        written.append(str(path))
    print(table_of(report))
    say(f"wrote {' and '.join(written)}")
    return 0


def asked_of(args: argparse.Namespace, adapter: str | None = None) -> Asked:
    """What the options ask for.

    Raises:
        EvaluationError: there is no such set, split or mode.
    """
    if args.set not in SETS:
        hint = f"{suggestion(args.set, SETS)} --list has all"
        raise EvaluationError(f"no set {args.set!r:.40}: {hint}")
    chosen = SETS[args.set]
    split = args.split or chosen.splits[0]
    mode = args.mode or (chosen.modes[0] if chosen.modes else None)
    for value, known, what in ((split, chosen.splits, "split"), (mode, chosen.modes, "mode")):
        if value is not None and value not in known:
            there = f"there are {', '.join(known)}" if known else "it has none"
            raise EvaluationError(f"{chosen.title} has no {what} {value!r:.40}: {there}")
    options = Options(
        shots=args.shots or 0, thinking=args.thinking, mode=mode, normaliser=args.normaliser
    )
    return Asked(
        chosen,
        split,
        options,
        seed=args.seed or 0,
        max_new_tokens=args.max_tokens,
        adapter=adapter,
        sampled=args.sampled,
        as_evaluated=args.as_evaluated,
        format=args.quantization,
    )


def _described(chosen: EvaluationSet) -> str:
    lines = [f"{chosen.name}: {chosen.title}, splits {', '.join(chosen.splits)}"]
    if chosen.modes:
        lines.append(f"  modes: {', '.join(chosen.modes)}")
    lines += [f"  DIR/{form}" for form in chosen.forms]
    if chosen.source:
        lines.append(f"  from {chosen.source}")
    return "\n".join(lines)
