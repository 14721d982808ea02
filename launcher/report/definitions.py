"""What every metric on the page means: the name under which results.json has it, formula, range, blind spot."""

from __future__ import annotations

from dataclasses import dataclass

from moe_testbed.launcher.report.words import EVEN, MODERATE, STRONG, UNEVEN, WEAK


@dataclass(frozen=True)
class Definition:
    """One metric in words."""

    key: str
    name: str
    formula: str
    range: str
    text: str


DEFINITIONS = (
    Definition(
        "loss",
        "Loss",
        "mean over domains of (sum of −ln p(token) / tokens)",
        "0 upwards, nats per token; lower is better",
        "Cross-entropy on the evaluation split. Every domain counts the same, however many tokens it has.",
    ),
    Definition("perplexity", "Perplexity", "exp(loss)", "1 upwards", "Of each seed's loss, then averaged over seeds."),
    Definition(
        "recovered",
        "Recovered",
        "(L_control − L_router) / (L_control − L_reference)",
        "0 is the control, 1 the reference; may lie outside",
        "How much of what the domain labels are worth a router finds by itself. The control has the reference's "
        "structure with labels permuted among sequences. The reference is its best form by this loss. The 95 % "
        "interval is a paired bootstrap: over seeds, or, with one seed, over evaluation sequences within each domain; "
        "the latter leaves out the noise of training, and over few seeds the interval is little more than their "
        "range. It is undefined where the reference's lead over its control is within its own noise.",
    ),
    Definition(
        "domain_information",
        "Domain information",
        "I(domain; expert) / H(domain)",
        "0 (the expert says nothing about the domain) to 1 (everything)",
        "Specialization. Domains of equal weight, per MoE layer. Blind to how the experts of one domain divide it. "
        f"In words: strongly from {STRONG}, moderately from {MODERATE}, weakly from {WEAK} above shuffled labels.",
    ),
    Definition(
        "domain_information_shuffled",
        "Shuffled labels",
        "domain information with the labels permuted among sequences",
        "0 to 1",
        "The level of chance for these counts: read domain information as what exceeds it.",
    ),
    Definition(
        "nmi_geometric",
        "NMI (geometric)",
        "I(domain; expert) / √(H(domain) H(expert))",
        "0 to 1, and below 1 wherever experts outnumber domains",
        "Comparable with published values; it rises when experts die.",
    ),
    Definition(
        "purity",
        "Purity",
        "Σ_e max_d π_d P(e|d)",
        "1/D (chance) to 1",
        "How often the domain is guessed right from the expert. Blind to one domain owning nearly all experts; "
        "matched purity, in results.json, gives each domain at most its even number of experts.",
    ),
    Definition(
        "normalised_effective_experts",
        "Effective experts",
        "H(q) / ln E for the load q; exp(H(q)) experts",
        "0 (one expert does everything) to 1 (even)",
        "Utilization over the mix with equal domain weights. It flatters: half of 64 experts dead, the rest even, is "
        "0.83. "
        f"In words: evenly from {EVEN}, unevenly from {UNEVEN}.",
    ),
    Definition(
        "dead_experts", "Dead experts", "share of experts with q_e < 0.1/E", "0 to 1", "On the evaluation split only."
    ),
    Definition(
        "max_violation",
        "Max violation",
        "(max q − mean q) / mean q",
        "0 (even) to E − 1",
        "What sets a step's time and memory when experts are spread over devices. Blind to all but the busiest expert.",
    ),
    Definition(
        "experts_per_token",
        "Experts per token",
        "assignments / tokens",
        "0 to E",
        "top_k for most routers; where tokens choose how many, what a token costs. Before any dropping.",
    ),
    Definition(
        "drop_rate",
        "Dropped",
        "dropped assignments / assignments",
        "0 to 1",
        "Assignments that found no place in their expert's buffer; 0 under dropless dispatch. Domains count the same; "
        "results.json has each domain's rate as drop_rate_by_domain. All routing metrics here count assignments before "
        "dropping unless they say otherwise; results.json has them after dropping too, as top_k_kept.",
    ),
    Definition(
        "tokens_per_second",
        "Tokens/s",
        "trained tokens / seconds",
        "0 upwards",
        "As trained here, side by side with other runs: compare loosely.",
    ),
    Definition("parameters", "Parameters", "all, and those active for one token", "", "Embeddings included."),
)
