"""What the numbers say, in sentences; and how numbers are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STRONG, MODERATE, WEAK = 0.5, 0.15, 0.03
"""Bounds of the words for `domain_information` above that of shuffled labels."""
EVEN, UNEVEN = 0.95, 0.85
"""Bounds of the words for `normalised_effective_experts`."""
SLOW, DROPS, DIFFERENT = 0.9, 0.005, 0.02
"""A verdict tells of the cost where a run has fewer tokens/s than this share of the fastest run's, drops more
assignments than this, or has active parameters that differ from the reference's by more than this."""
RANGE, FEW = 3, 5
"""With at most so many seeds the bootstrap interval of their mean is their range, or falls well short of 95 %."""

NOTHING = "–"


@dataclass(frozen=True)
class Verdict:
    """One sentence; `tone` is good, caution, bad or plain."""

    text: str
    tone: str
    subject: str = ""


def number(value: float | None, digits: int = 3, signed: bool = False) -> str:
    """Writes a number at so many decimals, or a dash; one that is rounded to 0 has no sign."""
    if value is None:
        return NOTHING
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    return text.replace("-", "−") if float(text.replace(",", "")) else text.lstrip("+-")


def percent(value: float | None, digits: int = 0) -> str:
    """Writes a share as per cent, or a dash."""
    return NOTHING if value is None else f"{number(100 * value, digits)} %"


def interval(estimate: dict[str, Any], scale: float = 1.0, digits: int = 3) -> str:
    """Writes the bounds of an estimate in brackets."""
    return f"[{number(estimate['low'] * scale, digits)}, {number(estimate['high'] * scale, digits)}]"


def headlines(results: dict[str, Any]) -> list[Verdict]:
    """Says whether the reference wins and whether `recovered` has a meaning, which a reader must know first."""
    reference = results["reference"]
    best, lead = reference["best"], reference["lead_over_control"]
    if not reference["labels"]:
        return [_without_reference(results)]
    if best is None:
        return [Verdict("No run of the reference finished, so that nothing can be said about the gap to it.", "bad")]
    verdicts = [_against_rival(best, results)]
    undefined = next((run["recovered"]["undefined"] for run in results["runs"] if run["label"] == best), None)
    if results["control"] is None:
        text = (
            "The suite names no control: what knowing the domains is worth cannot be told, and recovered has no value."
        )
        verdicts.append(Verdict(text, "plain"))
    elif undefined:
        verdicts.append(Verdict(f"Recovered is undefined: {undefined}.", "bad"))
    else:
        verdicts.append(
            Verdict(
                f"Knowing the domains is worth {number(lead['value'])} nats per token: the lead of {best} over "
                f"{lead['label']}, its control without information, {_noise(results, best, lead)}. Recovered is the "
                "share of it.",
                "good",
            )
        )
    return sorted(verdicts, key=lambda line: line.tone != "bad")


def _without_reference(results: dict[str, Any]) -> Verdict:
    """Says what a suite shows that compares with nothing, such as one of analysed checkpoints."""
    text = "This suite names no reference: it shows how experts are used, not how far from a reference they are."
    known = [run for run in results["runs"] if run["routing"]["top_k"]["domain_information"]["mean"] is not None]
    if not known:
        return Verdict(text, "plain")
    most = max(known, key=lambda run: run["routing"]["top_k"]["domain_information"]["mean"])
    information = _bounded(most["routing"]["top_k"]["domain_information"], 2)
    whose = f"those of {most['label']} specialise most by domain" if len(known) > 1 else f"{most['label']}'s specialise"
    return Verdict(f"{text} {whose[0].upper()}{whose[1:]}: domain information {information}.", "plain")


def _against_rival(best: str, results: dict[str, Any]) -> Verdict:
    reference = results["reference"]
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
        return Verdict(f"{text} than {best}, {_noise(results, best, rival)}.{also}", "bad")
    text = f"{best} leads {rival['label']}, the best other router, by {number(rival['value'])} nats per token"
    text += f", {_noise(results, best, rival)}.{also}"
    if rival["low"] is None or not rival["low"] > 0:
        return Verdict(f"The reference's win is within noise: {text}", "caution")
    if rival["over"] != "seeds":
        return Verdict(f"In this one seed {text}", "caution")
    return Verdict(f"The reference wins: {text}", "good")


def _behind(lead: float) -> str:
    return f"{number(abs(lead))} nats per token {'behind' if lead >= 0 else 'ahead'}"


def _noise(results: dict[str, Any], best: str, lead: dict[str, Any]) -> str:
    """The interval of a lead of the best reference, named after what it is worth."""
    if lead["over"] != "seeds":
        caveat = "one seed: the noise of training is not in it"
        return f"95 % interval {interval(lead)} over {lead['over']} ({caveat})"
    paired = [run["trainings"] for run in results["runs"] if run["label"] in (best, lead["label"])]
    finished = [{training["seed"] for training in run if training["state"] == "finished"} for run in paired]
    num_seeds = len(set.intersection(*finished))
    if num_seeds <= RANGE:
        return f"range {interval(lead)} over {num_seeds} seeds"
    few = ", too few for its 95 %" if num_seeds <= FEW else ""
    return f"{'interval' if few else '95 % interval'} {interval(lead)} over {num_seeds} seeds{few}"


def _bounded(stat: dict[str, Any], digits: int = 3, scale: float = 1.0) -> str:
    """The mean with its interval, if it has one."""
    text = number(None if stat["mean"] is None else scale * stat["mean"], digits)
    return text if stat.get("low") is None else f"{text} {interval(stat, scale, digits)}"


def without_result(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The trainings of a run that have no result; one whose loss is not finite has one."""
    return [training for training in run["trainings"] if training["state"] != "finished"]


def failures(runs: list[dict[str, Any]]) -> list[str]:
    """A line for each reason why a training has no result, with its run and seeds."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for training in without_result(run):
            place = f" at step {training['step']} of {training['steps']}" if training["steps"] else ""
            words = " ".join(str(training["reason"]).split())
            # What has diverged says so, and where.
            reason = words if training["state"] == "diverged" else f"{training['state']}{place}: {words}"
            reasons.setdefault((run["label"], reason), []).append(str(training["seed"]))
    return [
        f"{label}, seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}: {reason}"
        for (label, reason), seeds in reasons.items()
    ]


def verdict(run: dict[str, Any], results: dict[str, Any]) -> Verdict:
    """Puts one run in words: how far the reference is, whether its experts specialise, are used and matter, and its
    cost."""
    unfinished = without_result(run)
    if len(unfinished) == len(run["trainings"]):
        return Verdict(f"has no result: {unfinished[0]['reason']}.", "bad", run["label"])
    told = (_gap(run, results), _experts(run), _causes(run), _cost(run, results))
    parts = [part for part in told if part is not None]
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
    """Says whether the experts specialise and whether all are used."""
    routing = run["routing"]["top_k"]
    above = routing["domain_information_above_shuffled"]
    used, dead = routing["normalised_effective_experts"]["mean"], routing["dead_experts"]["mean"]
    if above["mean"] is None or used is None:
        return None
    words = ((STRONG, "specialise strongly"), (MODERATE, "specialise moderately"), (WEAK, "specialise weakly"))
    specialise = next((word for bound, word in words if above["mean"] >= bound), "do not specialise by domain")
    within_noise = above.get("low") is not None and above["low"] <= 0 and above["mean"] >= WEAK
    noise = ", within noise of shuffled labels" if within_noise else ""
    evenly = "evenly" if used >= EVEN else "unevenly" if used >= UNEVEN else "very unevenly"
    deaths = f", {percent(dead)} of them dead" if dead else ""
    information = _bounded(routing["domain_information"], 2)
    return (
        f"Its experts {specialise} (domain information {information}{noise}) and are used {evenly} "
        f"({number(used, 2)}{deaths})."
    )


def _causes(run: dict[str, Any]) -> str | None:
    """Says whether it matters which experts a domain uses."""
    causes = run.get("causes") or {}
    parts = []
    own, elsewhere = causes.get("keep_only_group"), causes.get("forced_elsewhere")
    if elsewhere is not None and elsewhere["mean"] is not None and _can_be_forced(run):
        rise = f"{_bounded(elsewhere, 2)} nats per token"
        kept = (
            "" if own is None or own["mean"] is None else f", kept to its own domain's it changes by {_bounded(own, 2)}"
        )
        if elsewhere.get("low") is not None and elsewhere["low"] > 0:
            parts.append(f"Forced to other domains' experts the loss rises by {rise}{kept}.")
        else:
            parts.append(f"Forced to other domains' experts the loss changes by {rise}, within noise{kept}.")
    share, sent = causes.get("specificity"), run["routing"]["top_k"]["purity"]["mean"]
    if share is not None and share["mean"] is not None and sent is not None and len(run["loss_by_domain"]) > 1:
        bounds = "" if share.get("low") is None else f" {interval(share, 100, 0)}"
        more = share.get("low") is not None and share["low"] > sent
        said = more or percent(sent) == percent(1)  # of what sends everything there is no more
        parts.append(
            f"Without an expert {percent(share['mean'])}{bounds} of the damage falls on the domain that it serves "
            f"most, which sends it {percent(sent)} of its tokens{'' if said else ': within noise'}."
        )
    return " ".join(parts) or None


def _can_be_forced(run: dict[str, Any]) -> bool:
    """Says whether the router chooses again among the experts left to it, by its scores or by the label that it reads.

    Without scores the choices just fall away; the control ignores the label that it is told.
    """
    entropy = (run["router_measures"] or {}).get("mean_token_entropy")
    scored = entropy is not None and entropy["mean"] is not None
    return run["role"] == "reference" or (scored and run["role"] != "control")


def _cost(run: dict[str, Any], results: dict[str, Any]) -> str | None:
    """Says what differs from the other runs: speed, dropping, size."""
    fastest = max((other["tokens_per_second"]["mean"] or 0.0 for other in results["runs"]), default=0.0)
    speed, dropped = run["tokens_per_second"]["mean"], run["drop_rate"]["mean"]
    parts = []
    if speed and speed < SLOW * fastest:
        parts.append(f"{percent(speed / fastest)} of the fastest run's tokens/s (as trained here: compare loosely)")
    if dropped and dropped > DROPS:
        parts.append(f"{percent(dropped, 1)} of its assignments dropped")
    sizes = {other["label"]: other["active_parameters"]["mean"] for other in results["runs"]}
    size, usual = sizes[run["label"]], sizes.get(results["reference"]["best"] or "")
    if size and usual and abs(size / usual - 1) > DIFFERENT:
        less_or_more = "more" if size > usual else "fewer"
        parts.append(f"{percent(abs(size / usual - 1))} {less_or_more} active parameters than the reference")
    return f"Cost: {'; '.join(parts)}." if parts else None
