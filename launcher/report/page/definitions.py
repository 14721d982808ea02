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
        "structure with labels permuted among sequences. The reference is its best form by this loss. The "
        "interval, at nominally 95 %, is a paired bootstrap: over seeds, or, with one seed, over documents within each "
        "domain; the latter leaves out the noise of training. Over two or three seeds the interval is their range, "
        "which holds the truth in about one of two cases, or three of four. Recovered is undefined where the "
        "reference's lead over its control is within its own noise.",
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
        "domain_information_above_shuffled",
        "Above shuffled",
        "domain information less that of shuffled labels",
        "−1 to 1; 0 is chance",
        "What the words of a verdict go by. Over documents its interval is that of domain information, from which the "
        "bias by chance is taken off already, so that 0 is no information; widened to hold the estimate where need be.",
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
        "matched purity gives each domain at most its even number of experts.",
    ),
    Definition(
        "matched_purity",
        "Matched purity",
        "Σ_e π_m P(e|m), m the domain that e is matched to",
        "1/D (chance) to 1",
        "Purity when no domain may own more than its even number of experts (Hungarian method).",
    ),
    Definition(
        "effective_experts", "Effective experts, as a number", "exp(H(q))", "1 to E", "Blind to which experts are used."
    ),
    Definition(
        "inverse_simpson", "Inverse Simpson", "1 / Σ_e q_e²", "1 to E", "As effective experts, nearer to the busiest."
    ),
    Definition(
        "coefficient_of_variation",
        "Coefficient of variation",
        "std(q) / mean(q)",
        "0 to √(E − 1)",
        "How loads scatter.",
    ),
    Definition("gini", "Gini", "Σ_ij |q_i − q_j| / (2E)", "0 (even) to (E − 1)/E", "How unequal the loads are."),
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
    Definition(
        "precision",
        "Precision",
        "Σ_d π_d share of d's routing weight that goes to the experts matched to d",
        "1/D (chance) to 1 (the reference's routing)",
        "Experts are matched to domains so that this is as high as it can be, no domain getting more than ⌈E/D⌉ "
        "experts. Of weights; of counts where a run did not record weights.",
    ),
    Definition(
        "coverage",
        "Coverage",
        "share of the experts matched to it that a domain uses, each at least a tenth of their even share",
        "0 to 1",
        "Low where experts matched to a domain stand idle. Blind to how much of a domain goes to its own experts.",
    ),
    Definition(
        "regret", "Regret", "1 − precision", "0 to 1", "The weight that the reference would have sent elsewhere."
    ),
    Definition(
        "mean_token_entropy",
        "Token entropy",
        "Σ_d π_d mean over tokens of H(p_t), in nats",
        "0 (every token is sure) to ln E",
        "How undecided a token is. Blind to whether all tokens are sure of the same expert.",
    ),
    Definition(
        "entropy_of_mean",
        "Entropy of the mean",
        "H(Σ_d π_d mean over tokens of p_t), in nats",
        "token entropy to ln E",
        "How even the scores of all tokens together are. Less the token entropy, it is what a token tells of its "
        "expert.",
    ),
    Definition(
        "mean_margin",
        "Margin",
        "mean over tokens of the k-th highest probability less the next",
        "0 to 1/k",
        "How close a choice is. Comparable only at equal numbers of experts and choices.",
    ),
    Definition(
        "router_cosine",
        "Router cosine",
        "mean over pairs of experts of |cos| of the vectors that stand for them in the router",
        "0 to 1; random vectors of n dimensions have √(2/(πn))",
        "Blind to lengths, and to which pairs are alike.",
    ),
    Definition(
        "specificity",
        "Specificity",
        "Σ damage to the domain that the barred expert serves most / Σ damage to all domains",
        "0 to 1; purity if all tokens of an expert suffer alike",
        "Of the damage above 0 that barring one expert at a time does, on a sample. Compare it with purity, the share "
        "of its tokens that an expert gets from that domain. Blind to how large the damage is: noise alone gives about "
        "1/D.",
    ),
    Definition(
        "ablation_damage",
        "Damage without an expert",
        "mean over experts of L without e − L, on the domain that e serves most",
        "nats per token; below 0 where the loss falls",
        "The expert is barred in its layer and its tokens choose anew. Blind to experts that stand in for one another.",
    ),
    Definition(
        "mean_replacement_damage",
        "Damage by its mean",
        "as damage without an expert, its output replaced by its mean over the tokens that use it",
        "nats per token",
        "It keeps the choice and removes what depends on the token; barred, the token chooses again. Either may cost "
        "more.",
    ),
    Definition(
        "keep_only_group",
        "Own group only",
        "L when every token may use only the experts matched to its domain − L",
        "nats per token",
        "The price of being kept to one's own domain's experts, in all layers at once. A router that reads the label "
        "is told this domain's; the control ignores what it is told.",
    ),
    Definition(
        "forced_elsewhere",
        "Others' groups only",
        "L when every token may use only another domain's experts − L, mean over the other domains",
        "nats per token",
        "What it is worth which experts a domain uses. A router that reads the label is told another domain's; the "
        "control ignores what it is told. The matrix of all pairs of domains is forced_matrix.",
    ),
    Definition(
        "expert_cosine",
        "Output cosine",
        "mean over tokens and pairs of experts of cos(f_i, f_j) (PES)",
        "−1 to 1",
        "All experts on the same tokens. A direction that all outputs share counts as likeness.",
    ),
    Definition(
        "expert_cka",
        "Output CKA",
        "‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), centred, mean over pairs",
        "0 to 1",
        "Whether outputs have the same geometry up to rotation and scale. Needs several times as many tokens as "
        "dimensions: read it as what exceeds CKA by chance.",
    ),
    Definition(
        "cka_chance",
        "CKA by chance",
        "M / (T + M) for outputs of width M on T tokens",
        "0 to 1",
        "About what the outputs of independent experts have.",
    ),
    Definition(
        "effective_rank",
        "Effective rank",
        "exp(H(σ / Σσ)), σ the singular values of the stacked outputs",
        "1 to E",
        "How many orthogonal experts would be as diverse. Blind to experts with small outputs.",
    ),
    Definition(
        "weight_cosine",
        "Weight cosine",
        "cosine of two experts' weights, neurons matched first, mean over pairs",
        "−1 to 1; independent experts somewhat above 0",
        "Whether experts are the same network but for the order of neurons.",
    ),
    Definition(
        "mean_strongest_share",
        "Strongest partner",
        "mean over experts i of max_j N_ij / N_i",
        "(k − 1)/(E − 1) to 1",
        "Of the tokens that use an expert, the share that uses its most frequent partner too. A pair may be "
        "redundant, or one domain's two experts.",
    ),
    Definition(
        "mean_share",
        "Mean partner",
        "mean over pairs of N_ij / N_i",
        "0 to 1; (k − 1)/(E − 1) for k choices a token",
        "What a partner shares on average. No level of chance for the strongest: the largest of E − 1 shares exceeds "
        "their mean by noise alone.",
    ),
    Definition(
        "token_information",
        "Token information",
        "I(token id; expert) / H(expert)",
        "0 to 1 (a table by token id)",
        "How much of the first choice the token alone decides. Ids seen at least 10 times, at most 2,048 of them.",
    ),
    Definition(
        "token_information_chance",
        "Its chance level",
        "mean of token information over all permutations of experts among occurrences",
        "0 to 1",
        "Read token information as what exceeds it.",
    ),
    Definition(
        "vocabulary_share",
        "Vocabulary share",
        "Σ_v n_v/N max_e P(e|v)",
        "the busiest expert's share to 1",
        "How often the expert is guessed right from the token id. High too where one expert does everything.",
    ),
    Definition(
        "saturation",
        "Saturation",
        "mean over tokens of |S_t ∩ S_final| / |S_final|",
        "k/E (chance) to 1",
        "The share of its final experts that a token already has, on a fixed probe.",
    ),
    Definition(
        "fluctuation",
        "Fluctuation",
        "share of tokens whose first choice is another than at the point before",
        "0 to 1; 1 − 1/E is chance",
        "It grows with the steps between two points, so compare only suites of equal spacing.",
    ),
    Definition(
        "settled_step",
        "Settled",
        "first step from which on saturation stays at or above 0.9",
        "a step before the last, or none",
        "By layer. Blind to what happens between the points recorded.",
    ),
)
