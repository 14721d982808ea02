"""What the numbers say, in sentences; and how numbers are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STRONG, MODERATE, WEAK = 0.5, 0.15, 0.03
"""Bounds of the words for `domain_information` above that of shuffled labels."""
EVEN, UNEVEN = 0.95, 0.85
"""Bounds of the words for `normalised_effective_experts`."""

NOTHING = "–"


@dataclass(frozen=True)
class Verdict:
    """One sentence; `tone` is good, caution, bad or plain."""

    text: str
    tone: str
    subject: str = ""


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """A number at so many decimals, or a dash."""
    return NOTHING if value is None else f"{value:{'+' if signed else ''},.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 0) -> str:
    """A share as per cent, or a dash."""
    return NOTHING if value is None else f"{number(100 * value, digits)} %"


def interval(estimate: dict[str, Any], scale: float = 1.0, digits: int = 3) -> str:
    """The bounds of an estimate in brackets."""
    return f"[{number(estimate['low'] * scale, digits)}, {number(estimate['high'] * scale, digits)}]"


def headlines(results: dict[str, Any]) -> list[Verdict]:
    """Whether the reference wins and whether `recovered` has a meaning: what a reader must know first."""
    reference = results["reference"]
    best, lead = reference["best"], reference["lead_over_control"]
    if best is None:
        return [Verdict("No run of the reference finished, so that nothing can be said about the gap to it.", "bad")]
    verdicts = [_against_rival(best, reference)]
    undefined = next((run["recovered"]["undefined"] for run in results["runs"] if run["label"] == best), None)
    if undefined:
        verdicts.append(Verdict(f"Recovered is undefined: {undefined}.", "bad"))
    else:
        verdicts.append(
            Verdict(
                f"Knowing the domains is worth {number(lead['value'])} nats per token: the lead of {best} over "
                f"{lead['label']}, its control without information, {_noise(lead)}. Recovered is the share of it.",
                "good",
            )
        )
    return sorted(verdicts, key=lambda line: line.tone != "bad")


def _against_rival(best: str, reference: dict[str, Any]) -> Verdict:
    rival, learned = reference["lead_over_best_other"], reference["lead_over_best_learned"]
    if rival is None:
        return Verdict(f"{best} has no router to be compared with: no other run finished.", "caution")
    if rival["value"] is None:
        return Verdict(f"The reference does not win: the loss of {best} or {rival['label']} is not finite.", "bad")
    also = ""
    if learned is not None and learned["label"] != rival["label"] and learned["value"] is not None:
        also = f" Of the learned routers {learned['label']} comes closest, {_behind(learned['value'])}."
    if rival["value"] <= 0:
        text = f"The reference does not win: {rival['label']} is {number(-rival['value'])} nats per token better"
        return Verdict(f"{text} than {best}, {_noise(rival)}.{also}", "bad")
    text = f"{best} leads {rival['label']}, the best other router, by {number(rival['value'])} nats per token"
    if not rival["low"] > 0:
        return Verdict(f"The reference's win is within noise: {text}, {_noise(rival)}.{also}", "caution")
    return Verdict(f"The reference wins: {text}, {_noise(rival)}.{also}", "good")


def _behind(lead: float) -> str:
    return f"{number(abs(lead))} nats per token {'behind' if lead >= 0 else 'ahead'}"


def _noise(estimate: dict[str, Any]) -> str:
    caveat = "" if estimate["over"] == "seeds" else " (one seed: the noise of training is not in it)"
    return f"95 % interval {interval(estimate)} over {estimate['over']}{caveat}"


def without_result(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The trainings of a run that have no result; one whose loss is not finite has one."""
    return [training for training in run["trainings"] if training["state"] != "finished"]


def failures(runs: list[dict[str, Any]]) -> list[str]:
    """A line for each reason why a training has no result, with its run and seeds."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for training in without_result(run):
            place = f" at step {training['step']} of {training['steps']}" if training["steps"] else ""
            reason = f"{training['state']}{place}: {' '.join(str(training['reason']).split())}"
            reasons.setdefault((run["label"], reason), []).append(str(training["seed"]))
    return [
        f"{label}, seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}: {reason}"
        for (label, reason), seeds in reasons.items()
    ]


def verdict(run: dict[str, Any], results: dict[str, Any]) -> Verdict:
    """One run in a sentence: what it recovers, how its experts specialise, and how evenly they are used."""
    unfinished = without_result(run)
    if len(unfinished) == len(run["trainings"]):
        return Verdict(f"has no result: {unfinished[0]['reason']}.", "bad", run["label"])
    parts = [_gap(run, results)]
    if (experts := _experts(run)) is not None:
        parts.append(experts)
    if not run["causal"]:
        parts.append("It is not causal: it looks at later tokens, so that its loss is not one of a language model.")
    if unfinished:
        reasons = "; ".join(f"seed {training['seed']}: {training['reason']}" for training in unfinished)
        parts.append(f"{len(unfinished)} of {len(run['trainings'])} seeds have no result ({reasons}).")
    tone = "caution" if unfinished or not run["causal"] else "plain"
    return Verdict(" ".join(parts), tone, run["label"])


def _gap(run: dict[str, Any], results: dict[str, Any]) -> str:
    loss, best = run["loss"]["mean"], results["reference"]["best"]
    if loss is None:
        return "ended with a loss that is not finite."
    at = f"loss {number(loss)} nats per token"
    share = run["recovered"]
    if run["label"] == best:
        return f"is the reference{' in its best form' if len(results['reference']['labels']) > 1 else ''}: {at}."
    if run["role"] == "control":
        return f"is the control, the reference's structure without its information: {at}."
    if share["undefined"]:
        return f"reaches {at}."
    if share["value"] > 1:
        ahead = f"{percent(share['value'])} of its lead {interval(share, 100, 0)}"
        return f"does better than the reference, {ahead}: {at}."
    if share["value"] < 0:
        return f"does worse than the control: {at}."
    return f"recovers {percent(share['value'])} {interval(share, 100, 0)} of the reference's lead: {at}."


def _experts(run: dict[str, Any]) -> str | None:
    routing = run["routing"]["top_k"]
    information = routing["domain_information_above_shuffled"]["mean"]
    used, dead = routing["normalised_effective_experts"]["mean"], routing["dead_experts"]["mean"]
    if information is None or used is None:
        return None
    words = ((STRONG, "specialise strongly"), (MODERATE, "specialise moderately"), (WEAK, "specialise weakly"))
    specialise = next((word for bound, word in words if information >= bound), "do not specialise by domain")
    evenly = "evenly" if used >= EVEN else "unevenly" if used >= UNEVEN else "very unevenly"
    deaths = f", {percent(dead)} of them dead" if dead else ""
    raw = number(routing["domain_information"]["mean"], 2)
    return f"Its experts {specialise} (domain information {raw}) and are used {evenly} ({number(used, 2)}{deaths})."
