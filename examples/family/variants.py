"""The variants that examples/family/run.sh compares, and the commands that make each of them.

One factor at a time is changed around a default: the objective of stage 1, then the signal, then
stage 2 and its trust region. All students have one KL budget. A line of the tables below is a
variant: drop it, change it or add one, and the same command makes what is missing. Every step is a
command of this repository, is written down in RUN/logs, and continues where it was interrupted. A
variant that fails does not stop the others. RUN/failed holds the reason, which the table of
compare.py shows.

Parts, in this order (--part all: one after the other):

    data        problems, base, rollouts, the base judged
    teachers    stage 1 of every objective
    objectives  the signal (teacher minus base) and the student of each, with one stage 2 for all
    options     the same for other targets, advantages, weights and masks of stage 1
    longer      twice as many epochs, where two end short of the student's KL
    references  unlearned, recovered and cross-fitted policies; all signals built from them
    signals     the student of each signal
    constructed the student of each signal that is made from other signals
    trust       the students of other trust regions
    stage2      the students of other stage-2 objectives
    curves      every checkpoint of stage 1 on held-out problems
    judge       every student on held-out problems

    python examples/family/variants.py --run runs/family/seed1 --seed 1 --part teachers
"""

from __future__ import annotations

import itertools
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common

ROOT = Path(__file__).resolve().parents[2]

# --------------------------------------------------------------------------------------------------
# The tables, NAME: FLAGS. The most informative variants come first.

TEACHER = "--epochs 2 --save-at 0.5 1 2"
# Stage 1. The learning rates are a first guess on seed 0; for most objectives one was tried.
OBJECTIVES = {
    "ce_gentle": "--loss ce --beta 0.5 --learning-rate 2e-4",
    "mse": "--loss mse --beta 0.3 --learning-rate 2e-4",
    "grpo": "--loss grpo --learning-rate 2e-4",
    "sapo": "--loss sapo --learning-rate 3e-4",
    "ce": "--loss ce --beta 0.05 --learning-rate 1e-4",
    "nft": "--loss nft --learning-rate 2e-4",
    "dapo": "--loss dapo --learning-rate 2e-4",
    "cispo": "--loss cispo --learning-rate 1e-4",
    "topr": "--loss topr --learning-rate 1e-4",
    "reinforce": "--loss reinforce --learning-rate 5e-5",
    "gspo_wide": "--loss gspo --gspo-clip-low 0.05 --gspo-clip-high 0.05 --learning-rate 2e-4",
    "bapo": "--loss bapo --learning-rate 2e-4",
    "vespo": "--loss vespo --learning-rate 2e-4",
    "nsr": "--loss nsr --learning-rate 1e-4",
    "sft": "--loss sft --learning-rate 2e-4",
    "weighted_reinforce": "--loss weighted_reinforce --learning-rate 1e-4",
    "psr": "--loss psr --learning-rate 2e-4",
    "gspo": "--loss gspo --learning-rate 2e-4",
}
# Changes of an objective of stage 1: the other targets of mse, Dr.GRPO's advantages, and weights
# and masks on GRPO, with their authors' values where there are any (docs/family.md). Nothing was
# tuned.
OPTIONS = {
    "mse_verdict": "--loss mse --mse-target verdict --beta 0.3 --learning-rate 2e-4",
    "mse_centred": "--loss mse --mse-target centred --beta 0.3 --learning-rate 2e-4",
    "dr_grpo": "--loss dr_grpo --advantages group_mean --learning-rate 2e-4",
    "grpo_paced": "--loss grpo --paced 1 1 --learning-rate 2e-4",
    "grpo_ace": "--loss grpo --ace-alpha 1 --learning-rate 2e-4",
    "grpo_masked": "--loss grpo --mask-entropy 0.2 --mask-kl 0.2 --learning-rate 2e-4",
    "nsr_spared": "--loss nsr --spare-ceiling 0.2 --learning-rate 1e-4",
}
TEACHERS = OBJECTIVES | OPTIONS
# A curve that ends short of its student's KL says nothing about early stopping there. Those that
# did so on any of seeds 1 to 3 go on to four epochs, as many as teacher and student take together.
LONGER = (
    "mse",
    "grpo",
    "nft",
    "dapo",
    "topr",
    "reinforce",
    "vespo",
    "nsr",
    "sft",
    "weighted_reinforce",
    "gspo",
)
LONGER_EPOCHS = "--epochs 4 --save-at 3 4"

# Their students; the signal is teacher minus base. Teachers moved by very different amounts, so
# each student takes the scale and bounds of the best forecast within one KL, on held-out problems.
# A signal that promises nothing is listed as failed, with that reason.
WITHIN = "--within-kl 1.1"
STUDENT = "--objective generalized_kl --epochs 3 --learning-rate 2e-4"

# Policies that signals are built against, in chains: a later one may start from an earlier one.
REFERENCES = {
    "mse_unlearned": {
        "mse_unlearned": "--loss mse --beta 0.3 --invert-rewards --learning-rate 2e-4 "
        "--epochs 3 --save-at 3"
    },
    "ce_unlearned": {
        "ce_unlearned": "--loss ce --beta 0.5 --ce-prior --invert-rewards --learning-rate 2e-4 "
        "--epochs 4 --save-at 4",
        "recovered": "--init {stage1}/ce_unlearned --loss sft --learning-rate 2e-4 "
        "--epochs 2 --save-at 2",
    },
    # This one learns one problem in sixteen by heart, in forty epochs. A split makes {run}/few.
    "memorised": {
        "memorised": "--rollouts {run}/few/1 --loss ce --beta 0.05 --learning-rate 3e-4 "
        "--batch-size 64 --epochs 40 --save-at 40"
    },
    "collapsed": {
        "collapsed": "--loss ce --beta 0.05 --unlearn --learning-rate 1e-4 --epochs 1 --save-at 1",
        "risen": "--init {stage1}/collapsed --loss sft --learning-rate 2e-4 --epochs 2 --save-at 2",
    },
}
# Signals, NAME: (how it is built, its stage 2). First come those of policies, then those of other
# signals. The default's bounds are those that its forecast preferred on seed 0; they stand here so
# that trust regions can be changed one at a time. Where no forecast can be made (a signal that
# knows the verdicts, one joined from two halves) they are used too.
DEFAULT = "--signal-scale 6 --signal-clip 2 --signal-floor 0.6 --token-kl 1.5"
SIGNALS = {
    "mse_unlearned": ("--teachers {base} --references {stage1}/mse_unlearned", DEFAULT),
    "ce_unlearned": ("--teachers {base} --references {stage1}/ce_unlearned", WITHIN),
    "strong": ("--teachers {stage1}/ce --references {base}", WITHIN),
    "ruined": ("--teachers {stage1}/sapo --references {base}", WITHIN),
    "ruined_minus_unlearned": (
        "--teachers {stage1}/sapo --references {stage1}/mse_unlearned",
        WITHIN,
    ),
    "memorised": ("--teachers {stage1}/memorised --references {base}", WITHIN),
    "memorised_minus_unlearned": (
        "--teachers {stage1}/memorised --references {stage1}/mse_unlearned",
        WITHIN,
    ),
    "recovery": ("--teachers {stage1}/recovered --references {stage1}/ce_unlearned", WITHIN),
    "strong_minus_unlearned": (
        "--teachers {stage1}/ce --references {stage1}/mse_unlearned",
        WITHIN,
    ),
    "collapsed": ("--teachers {base} --references {stage1}/collapsed", WITHIN),
    "collapse_recovery": ("--teachers {stage1}/risen --references {stage1}/collapsed", WITHIN),
    "crossfit": ("", DEFAULT),  # its files are made in a chain of its own
    "mean": (
        "--signals {signals}/mse_unlearned.safetensors {signals}/ce_unlearned.safetensors "
        "--combine mean",
        WITHIN,
    ),
    # The strong teacher at a tenth of the unlearned policy's weight, as in run.sh. Both terms are
    # added, or kept only where they agree.
    "sum": (
        "--signals {signals}/strong.safetensors {signals}/mse_unlearned.safetensors "
        "--weights 0.1 2 --combine sum",
        WITHIN,
    ),
    "agreement": (
        "--signals {signals}/strong.safetensors {signals}/mse_unlearned.safetensors "
        "--weights 0.1 2 --combine agreement",
        WITHIN,
    ),
    "log_mixture": ("--signals {signals}/mse_unlearned.safetensors --bound log_mixture", WITHIN),
    "power": ("--signals {signals}/mse_unlearned.safetensors --bound power", WITHIN),
    "verdict_aligned": ("--signals {signals}/mse_unlearned.safetensors --verdict aligned", DEFAULT),
    "verdict_scaled": (
        "--signals {signals}/mse_unlearned.safetensors --verdict scaled",
        "--objective pg --signal-scale 1 --signal-clip 3 --signal-floor 0 --token-kl inf "
        "--learning-rate 1e-4",
    ),
}
DEFAULT_SIGNAL = "mse_unlearned"

# Stage 2, NAME: (signal, what differs from the default). First come the trust regions.
TRUST = {
    "no_token_kl": (DEFAULT_SIGNAL, "--token-kl inf"),
    "no_floor": (DEFAULT_SIGNAL, "--signal-floor 0"),
    "tight_budget": (DEFAULT_SIGNAL, "--kl-budget 1"),
    "reanchor": (DEFAULT_SIGNAL, "--reanchor"),
    "adaptive_kl": (DEFAULT_SIGNAL, "--kl-coef 0.01 --kl-target 0.7"),
}
# Then the objectives. A clone has the name of its teacher instead of a signal.
STAGE2 = {
    "regression": (DEFAULT_SIGNAL, "--objective regression"),
    "pg": (DEFAULT_SIGNAL, "--objective pg --learning-rate 2e-4"),
    "pg_wide": (DEFAULT_SIGNAL, "--objective pg --learning-rate 2e-4 --clip-low 0.9 --clip-high 2"),
    # Extrapolation away from the unlearned reference: policy = U + 9 (base - U) = base + 8 (...).
    "gopd": (
        DEFAULT_SIGNAL,
        "--objective gopd --signal-scale 9 --signal-clip inf --signal-floor 0 --token-kl inf "
        "--learning-rate 1e-4",
    ),
    "exopd_strong": (
        "strong",
        "--objective gopd --signal-scale 1.25 --signal-clip inf --signal-floor 0 --token-kl inf "
        "--learning-rate 1e-4",
    ),
    "reverse_kl": ("ce", "--objective reverse_kl"),
    "forward_kl": ("ce", "--objective forward_kl"),
    "jsd": ("ce", "--objective jsd"),
    "topk": ("ce", "--objective topk"),
    "forward_kl_strong": ("gspo_wide", "--objective forward_kl"),
    "trrd_strong": ("strong", "--objective trrd --learning-rate 2e-4"),
    "kdrl_strong": ("strong", "--objective kdrl --learning-rate 2e-4"),
}
# The clones of a teacher: they have no signal and no bounds of one.
CLONES = ("reverse_kl", "forward_kl", "jsd", "topk", "forward_kl_strong")

# The budget of all students, nats per response of the proxy, KL(base || student). It is a guard
# against running away and not a brake. The proxy counts deep cuts at a higher price than the KL
# that is reported: on seeds 0 and 1 the default ends at proxies of 1.0 and 1.3, and at KLs of 0.61.
# A student that its budget stops half-way has spent as much KL as one that comes to its end, and
# has learnt less (tight_budget).
BUDGET = "--kl-budget 2 --kl-every 8"

QUICK = ("ce_gentle", "mse_unlearned", "no_floor", "pg")  # --quick makes one of each factor


@dataclass
class Args:
    run: Path
    """folder to write, such as runs/family/seed1"""
    part: Literal[
        "all",
        "data",
        "teachers",
        "objectives",
        "options",
        "longer",
        "references",
        "signals",
        "constructed",
        "trust",
        "stage2",
        "curves",
        "judge",
    ] = "all"
    """what to make, see the top of this page"""
    seed: int = 0
    """seed of problems, base, rollouts, training and judging"""
    quick: bool = False
    """every step in small, one variant of each factor"""
    jobs: int = 2
    """commands that run at the same time, one core each"""


# --------------------------------------------------------------------------------------------------
# From a line of a table to commands. A command is a list of words, its first the script.

Chain = list[list[str]]  # commands one after the other
DATA = "--base {base} --rollouts {run}/rollouts --seed {seed}"


def merged(*texts: str) -> list[str]:
    """Splits all texts into words; of a flag that comes twice the last one counts.

    >>> merged("--epochs 2 --save-at 1 2", "--epochs 1 --reanchor")
    ['--epochs', '1', '--save-at', '1', '2', '--reanchor']
    """
    flags: dict[str, list[str]] = {}
    for word in " ".join(texts).split():
        if word.startswith("--"):
            flags[word] = values = []
        else:
            values.append(word)
    return [word for flag, values in flags.items() for word in (flag, *values)]


def factors() -> dict[str, dict[str, str]]:
    """Returns {factor: {name: what its line says}} of all students."""
    return {
        "objective": TEACHERS,
        "signal": {name: " ".join(line).strip() for name, line in SIGNALS.items()},
        "trust region": {name: " ".join(line) for name, line in TRUST.items()},
        "stage 2": {name: " ".join(line) for name, line in STAGE2.items()},
    }


class Commands:
    """Makes the commands of a run from the lines of the tables.

    A method of PARTS returns waves of chains, {name: chain}. The chains of a wave do not depend on
    each other, but on the wave before."""

    def __init__(self, args: Args) -> None:
        self.quick, self.jobs = args.quick, args.jobs
        self.places: dict[str, Any] = {"run": args.run, "seed": args.seed}
        self.places |= {name: args.run / name for name in ("base", "stage1", "signals")}

    # Single commands

    def command(self, script: str, *flags: str) -> list[str]:
        return [script, *(word.format(**self.places) for word in merged(*flags))]

    def train(self, output: str, *flags: str) -> list[str]:
        output = f"--output {{run}}/{output}"
        return self.command("examples/family/stage1.py", DATA, output, *flags)

    def policy(self, name: str, *flags: str) -> list[str]:
        small = "--epochs 1 --save-at 1" if self.quick else ""
        return self.train(f"stage1/{name}", *flags, small)

    def teacher(self, name: str) -> list[str]:
        return self.policy(name, TEACHER, TEACHERS[name])

    def build(self, name: str, flags: str) -> list[str]:
        script = "build_signals.py" if "--teachers" in flags else "examples/family/signals.py"
        data = "--base {base} --rollouts {run}/rollouts"
        if "--verdict" not in flags:
            data += " --held-out-rollouts {run}/held_out/rollouts"
        return self.command(script, data, f"--output {{signals}}/{name}.safetensors", flags)

    def distil(self, name: str, *flags: str) -> list[str]:
        small = "--epochs 1" if self.quick else ""
        output = f"--output {{run}}/students/{name}"
        return self.command("examples/family/stage2.py", DATA, output, BUDGET, *flags, small)

    def student(self, name: str, signal: str, *flags: str) -> list[str]:
        if self.quick:  # so little data promises nothing
            flags = tuple(text.replace(WITHIN, "--signal-scale 2") for text in flags)
        return self.distil(name, f"--signals {{signals}}/{signal}.safetensors", *flags)

    # Chains of them

    def clone(self, name: str, teacher: str, flags: str) -> Chain:
        settings = "--epochs 3 --learning-rate 2e-4"
        if name != "topk":
            return [self.distil(name, f"--teacher {{stage1}}/{teacher}", settings, flags)]
        stored = "{run}/topk.safetensors"
        flags_of_score = f"--teacher {{stage1}}/{teacher} --output {stored}"
        rollouts = "--rollouts {run}/rollouts --k 8"
        score = self.command("examples/family/score_topk.py", rollouts, flags_of_score)
        return [score, self.distil(name, f"--teacher {stored}", settings, flags)]

    def student_of_teacher(self, name: str) -> Chain:
        return [
            self.build(name, f"--teachers {{stage1}}/{name} --references {{base}}"),
            self.student(name, name, STUDENT, WITHIN),
        ]

    def crossfit(self) -> Chain:
        """Trains the default's reference on each half of the problems, and uses it on the other."""
        flags = REFERENCES[DEFAULT_SIGNAL][DEFAULT_SIGNAL]
        split = "--rollouts {run}/rollouts --output {run}/crossfit"
        chain = [self.command("examples/family/split_rollouts.py", split)]
        for i in (0, 1):
            half = f"--rollouts {{run}}/crossfit/{i}"
            chain.append(self.train(f"crossfit/policy{i}", half, flags))
        for i in (0, 1):
            half = f"--base {{base}} --rollouts {{run}}/crossfit/{i}"
            policies = f"--teachers {{base}} --references {{run}}/crossfit/policy{1 - i}"
            output = f"--output {{run}}/crossfit/signals{i}.safetensors"
            chain.append(self.command("build_signals.py", half, policies, output))
        joined = (
            "--base {base} --rollouts {run}/rollouts --halves {run}/crossfit/0 {run}/crossfit/1 "
            "--signals {run}/crossfit/signals0.safetensors {run}/crossfit/signals1.safetensors "
            "--output {signals}/crossfit.safetensors"
        )
        return [*chain, self.command("examples/family/join_signals.py", joined)]

    def judge(self, what: str, n: int) -> dict[str, Chain]:
        flags = f"--run {{run}} --what {what} --n {n} --seed {{seed}}"
        shards = [f"--shard {i}/{self.jobs}" for i in range(self.jobs)]
        script = "examples/arithmetic/judge.py"
        return {f"{what}{i}": [self.command(script, flags, s)] for i, s in enumerate(shards)}

    def chosen(self, table: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in table.items() if not self.quick or k in QUICK}

    # The parts

    def data(self) -> list[dict[str, Chain]]:
        sampling = "--model {base} --max-new-tokens 128 --seed {seed}"
        size = "--train 48 --test 64 --steps 150" if self.quick else ""
        # The base's pass rates, of 32 samples, give the curve of the optimum.
        n, n_test, n_held_out = (4, 4, 4) if self.quick else (16, 32, 32)
        script = "examples/arithmetic/make_base.py"
        base = self.command(script, "--output {run} --seed {seed}", size)
        flags = f"--problems {{run}}/train.jsonl --output {{run}}/rollouts --n {n}"
        rollouts = self.command("evaluate.py", sampling, flags)
        mark = self.command("examples/arithmetic/annotate.py", "--rollouts {run}/rollouts")
        flags = f"--problems {{run}}/test.jsonl --output {{run}}/eval/base --n {n_test}"
        judged = self.command("evaluate.py", sampling, flags, "--base {base} --kl-samples 512")
        # Base samples of other problems, for the forecasts.
        fresh = f"--name held-out --n {16 if self.quick else 128} --seed {{seed}}"
        taken = "--without {run}/train.jsonl {run}/test.jsonl"
        place = "--output {run}/held_out/train.jsonl"
        problems = self.command("examples/arithmetic/problems.py", place, fresh, taken)
        flags = "--problems {run}/held_out/train.jsonl --output {run}/held_out/rollouts"
        held_out = self.command("evaluate.py", sampling, flags, f"--n {n_held_out}")
        last = {"rollouts": [rollouts, mark], "held_out": [problems, held_out]}
        return [{"base": [base]}, last | {"base_judged": [judged]}]

    def teachers(self) -> list[dict[str, Chain]]:
        return [{name: [self.teacher(name)] for name in self.chosen(OBJECTIVES)}]

    def objectives(self) -> list[dict[str, Chain]]:
        return [{name: self.student_of_teacher(name) for name in self.chosen(OBJECTIVES)}]

    def options(self) -> list[dict[str, Chain]]:
        chains = {k: [self.teacher(k), *self.student_of_teacher(k)] for k in self.chosen(OPTIONS)}
        return [chains]

    def longer(self) -> list[dict[str, Chain]]:
        names = QUICK[:1] if self.quick else LONGER
        train = {
            name: [self.train(f"stage1/{name}_longer", TEACHERS[name], LONGER_EPOCHS)]
            for name in names
        }
        return [train]

    def references(self) -> list[dict[str, Chain]]:
        policies = {
            first: [self.policy(name, flags) for name, flags in chain.items()]
            for first, chain in self.chosen(REFERENCES).items()
        }
        built = {name: line[0] for name, line in self.chosen(SIGNALS).items()}
        if "crossfit" in built:
            policies["crossfit"] = self.crossfit()
        if "memorised" in policies:
            few = "--rollouts {run}/rollouts --output {run}/few --share 0.0625"
            split = self.command("examples/family/split_rollouts.py", few)
            policies["memorised"] = [split, *policies["memorised"]]
        of_policies = {k: [self.build(k, v)] for k, v in built.items() if "--teachers" in v}
        of_signals = {k: [self.build(k, v)] for k, v in built.items() if "--signals" in v}
        return [policies, of_policies, of_signals]

    def signals(self) -> list[dict[str, Chain]]:
        return [self.of_built("--signals" not in how for how, _ in SIGNALS.values())]

    def constructed(self) -> list[dict[str, Chain]]:
        return [self.of_built("--signals" in how for how, _ in SIGNALS.values())]

    def of_built(self, taken: Iterable[bool]) -> dict[str, Chain]:
        """Makes the students of the lines of SIGNALS that are taken."""
        table = dict(itertools.compress(SIGNALS.items(), taken))
        return {
            name: [self.student(name, name, STUDENT, flags)]
            for name, (_, flags) in self.chosen(table).items()
        }

    def trust(self) -> list[dict[str, Chain]]:
        return [self.of_signal(TRUST)]

    def stage2(self) -> list[dict[str, Chain]]:
        return [self.of_signal(STAGE2)]

    def of_signal(self, table: dict[str, tuple[str, str]]) -> dict[str, Chain]:
        chains = {}
        for name, (source, flags) in self.chosen(table).items():
            if name in CLONES:
                chains[name] = self.clone(name, source, flags)
            else:
                bounds = "" if "--signal-scale" in flags else SIGNALS[source][1]
                chains[name] = [self.student(name, source, STUDENT, bounds, flags)]
        return chains

    def curves(self) -> list[dict[str, Chain]]:
        return [self.judge("checkpoints", 2)]

    def judged(self) -> list[dict[str, Chain]]:
        return [self.judge("students", 2 if self.quick else 4)]


PARTS = {
    "data": Commands.data,
    "teachers": Commands.teachers,
    "objectives": Commands.objectives,
    "options": Commands.options,
    "longer": Commands.longer,
    "references": Commands.references,
    "signals": Commands.signals,
    "constructed": Commands.constructed,
    "trust": Commands.trust,
    "stage2": Commands.stage2,
    "curves": Commands.curves,
    "judge": Commands.judged,
}


# --------------------------------------------------------------------------------------------------
# Running them


def last_words(log: Path) -> str:
    """Returns what a failed command ended with: its error, or its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["nothing was printed"])[-1]


def run_chain(chain: Chain, log: Path) -> str | None:
    """Runs the commands of a chain up to the first that fails. Returns why it failed, or None."""
    for words in chain:
        with log.open("a") as stream:
            print("$ python", shlex.join(words), file=stream, flush=True)
            command = [sys.executable, str(ROOT / words[0]), *words[1:]]
            done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT)
        if done.returncode:
            return last_words(log)
    return None


def run_chains(chains: dict[str, Chain], args: Args, part: str) -> list[str]:
    """Runs all chains, `jobs` at a time. Returns the names of those that failed.

    RUN/failed/PART/NAME.txt says why; where a chain succeeds, an older such file goes."""
    logs, failed_folder = args.run / "logs" / part, args.run / "failed" / part
    logs.mkdir(parents=True, exist_ok=True)

    def run(name: str) -> bool:
        """Runs one chain and reports on it. Returns whether it failed."""
        began, report = time.monotonic(), failed_folder / f"{name}.txt"
        why = run_chain(chains[name], logs / f"{name}.log")
        took = f"{time.monotonic() - began:.0f} s"
        print(f"  {name}: {f'FAILED after {took}: {why}' if why else took}", flush=True)
        report.unlink(missing_ok=True)
        if why is not None:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(why + "\n")
        return why is not None

    with ThreadPoolExecutor(args.jobs) as pool:
        failed = pool.map(run, chains)
    return [name for name, bad in zip(chains, failed, strict=True) if bad]


def main(args: Args) -> None:
    common.require(args, "jobs", lambda v: v >= 1, "1 or more")
    kind, kind_file = ("quick" if args.quick else "full"), args.run / "kind"
    held = kind_file.read_text().strip() if kind_file.is_file() else kind
    if held != kind:
        raise common.UserError(
            f"--run {args.run}: holds a {held} run, and this is a {kind} one; choose another folder"
        )
    args.run.mkdir(parents=True, exist_ok=True)
    kind_file.write_text(kind)
    for part in PARTS if args.part == "all" else (args.part,):
        start = time.monotonic()
        print(f"== {part}", flush=True)
        waves = PARTS[part](Commands(args))
        failed = [name for wave in waves for name in run_chains(wave, args, part)]
        seconds, times = time.monotonic() - start, args.run / "seconds.json"
        spent = common.read_json(times) if times.is_file() else {}
        common.write_json(times, spent | {part: spent.get(part, 0) + seconds})
        print(f"{part}: {seconds:.0f} s", flush=True)
        if failed and part in ("data", "curves", "judge"):
            raise common.UserError(
                f"{part}: {', '.join(failed)} failed; see {args.run}/logs/{part}"
            )
    total = sum(common.read_json(args.run / "seconds.json").values())
    print(f"{args.run}: {total / 60:.1f} minutes so far, all parts and repetitions together")


if __name__ == "__main__":
    common.run(main, Args, __doc__)
