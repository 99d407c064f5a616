"""Known bugs: each is put into a copy of the code, and its test must fail. ``make mutants``.

Most are the numeric traps of gpt-oss: mistakes that still give fluent text.
"""

from __future__ import annotations

from typing import NamedTuple

LOGITS = "tests/test_model.py::test_logits_equal_transformers[{kernels}-{form}]"
BF16 = LOGITS.format(kernels="auto", form="bf16")
MXFP4 = LOGITS.format(kernels="auto", form="mxfp4")
REFERENCE = LOGITS.format(kernels="reference", form="bf16")
HUB = LOGITS.format(kernels="auto", form="bf16, hub's rope")
COMPANY = "tests/test_model.py::test_a_tokens_logits_never_depend_on_its_company[False]"
TWO_RANKS = "tests/test_parallel.py::test_tokens_equal_those_of_one_process[2]"
FOUR_RANKS = "tests/test_parallel.py::test_tokens_equal_those_of_one_process[4]"
EXCHANGE = "tests/test_exchange.py::test_tokens_come_back_as_if_computed_in_one_place"
NORMS = "tests/test_kernels.py::test_norms_round_once"
SPLITS = "tests/interpreter/test_attention.py::test_attention"
SHARES = "tests/test_weights.py::test_ranks_read_their_share_and_no_more"


class Mutant(NamedTuple):
    file: str
    text: str  # occurs exactly once
    replacement: str
    test: str
    why: str


MUTANTS = (
    # Norms.
    Mutant(
        "kernels/reference.py",
        "(y.to(x.dtype) * weight if round_first else y * weight)",
        "(y * weight if round_first else y.to(x.dtype) * weight)",
        NORMS,
        "gpt-oss multiplies by the weight before it rounds",
    ),
    Mutant(
        "kernels/cpu.py",
        "return F.rms_norm(x, weight.shape, weight, eps)",
        "return F.rms_norm(x, weight.shape, None, eps) * weight",
        NORMS,
        "the same on a CPU",
    ),
    # Attention.
    Mutant(
        "kernels/attention.py",
        """* 1.4426950408889634
        norm = tl.full([ROWS], 1.0, tl.float32)""",
        """* 1.4426950408889634
        norm = tl.full([ROWS], 1.0, tl.float32) * splits""",
        SPLITS,
        "where keys are split, the sink counts once",
    ),
    Mutant(
        "kernels/reference.py",
        "sink = sinks.float()[:, None, None]",
        "sink = sinks.float()[:, None, None] * scale",
        REFERENCE,
        "the sink is a logit of its own, not scaled like scores",
    ),
    Mutant(
        "kernels/reference.py",
        ".softmax(dim=-1)[..., :-1]",
        "[..., :-1].softmax(dim=-1)",
        REFERENCE,
        "the sink belongs into the denominator",
    ),
    Mutant(
        "kernels/reference.py",
        "visible = (key <= query) & (key >= rows.first_key(query))",
        "visible = (key <= query) & (key >= rows.first_key(query) - 1)",
        REFERENCE,
        "a window of n sees itself and n - 1 others: one key too many",
    ),
    Mutant(
        "kernels/reference.py",
        "return (position - self.window + 1).clamp(min=0) if self.window else position * 0",
        "return (position - self.window + 2).clamp(min=0) if self.window else position * 0",
        REFERENCE,
        "one key too few",
    ),
    Mutant(
        "kernels/exact.py",
        "visible &= key[:, None, :] >= rows.first_key(pos)[:, :, None]",
        "visible &= key[:, None, :] >= rows.first_key(pos)[:, :, None] - 1",
        BF16,
        "the same in the exact kernels",
    ),
    Mutant(
        "kernels/reference.py",
        "else x.roll(x.shape[-1] // 2, -1)",
        "else x.roll(1, -1)",
        REFERENCE,
        "halves are rotated, not neighbours",
    ),
    Mutant(
        "workers/architecture.py",
        '"full_attention" if i % 2 else "sliding_attention" for i in range(layers)',
        '"sliding_attention" if i % 2 else "full_attention" for i in range(layers)',
        "tests/test_checkpoint_config.py",
        "even layers slide where the configuration does not say",
    ),
    Mutant(
        "workers/architecture.py",
        'windows=tuple(window if kind == "sliding_attention" else 0 for kind in kinds)',
        'windows=tuple(0 if kind == "sliding_attention" else window for kind in kinds)',
        BF16,
        "which layers have the window",
    ),
    Mutant(
        "workers/model.py",
        "self.scale, self.eps = arch.head_dim, arch.head_dim**-0.5, arch.rms_norm_eps",
        "self.scale, self.eps = arch.head_dim, arch.hidden_size**-0.5, arch.rms_norm_eps",
        BF16,
        "scores are scaled by the head's size",
    ),
    Mutant(
        "parallelism/layers.py",
        'biases.append(part(f"{name}.bias", (count * head_dim,), 0, cut))',
        'biases.append(part(f"{heads[0][0]}.bias", (heads[0][1] * head_dim,), 0, cut))',
        BF16,
        "each projection has its own bias",
    ),
    # Positions.
    Mutant(
        "workers/model.py",
        "return blended, 0.1 * math.log(yarn.factor) + 1 if yarn.factor > 1 else 1.0",
        "return blended, 1.0",
        BF16,
        "YaRN's concentration",
    ),
    Mutant(
        "workers/model.py",
        "    if yarn.truncate:\n",
        "    if not yarn.truncate:\n",
        "tests/test_model.py::test_yarn_equals_transformers",
        "YaRN's truncation",
    ),
    Mutant(
        "workers/model.py",
        "blended = frequencies * (1 - ramp) + stretched * ramp",
        "blended = frequencies * ramp + stretched * (1 - ramp)",
        BF16,
        "the low frequencies are stretched",
    ),
    Mutant(
        "workers/architecture.py",
        'config.get("rope_parameters") or config.get("rope_scaling") or {}',
        'config.get("rope_parameters") or {}',
        HUB,
        "the hub's spelling of the rope configuration",
    ),
    Mutant(
        "workers/architecture.py",
        'config.get("rope_parameters") or config.get("rope_scaling") or {}',
        'config.get("rope_scaling") or {}',
        BF16,
        "transformers' spelling of it",
    ),
    # Experts.
    Mutant(
        "kernels/exact.py",
        "gate, up = x[..., 0::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)",
        "gate, up = x.chunk(2, -1)\n    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)",
        BF16,
        "gate and up rows are interleaved, not halves",
    ),
    Mutant(
        "kernels/exact.py",
        "x[..., 1::2].clamp(-limit, limit)",
        "x[..., 1::2]",
        BF16,
        "up is clamped",
    ),
    Mutant(
        "kernels/reference.py",
        "gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)",
        "gate, up = gate.clamp(-limit, limit), up.clamp(-limit, limit)",
        "tests/test_kernels.py",
        "gate is clamped from above only",
    ),
    Mutant(
        "kernels/exact.py",
        "return gate / (1 + torch.exp(-alpha * gate)) * (up + 1)",
        "return gate / (1 + torch.exp(-alpha * gate)) * up",
        BF16,
        "up + 1",
    ),
    Mutant(
        "kernels/exact.py",
        "return gate / (1 + torch.exp(-alpha * gate)) * (up + 1)",
        "return gate / (1 + torch.exp(-gate)) * (up + 1)",
        BF16,
        "alpha is 1.702",
    ),
    Mutant(
        "kernels/reference.py",
        "return ids, top.softmax(dim=-1, dtype=torch.float32)",
        "return ids, logits.softmax(dim=-1, dtype=torch.float32).gather(-1, ids)",
        BF16,
        "the router's softmax is over the chosen experts only",
    ),
    Mutant(
        "workers/model.py",
        "ids, weights = ops.route(self.router(h), self.k, plan.slots)",
        "ids, weights = ops.route(self.router(h) - self.router.bias, self.k, plan.slots)",
        BF16,
        "the router has a bias",
    ),
    Mutant(
        "parallelism/experts.py",
        "slices = [Slice(down, shape, (run, cut, every), transposed=True) for run in mine]",
        "slices = [Slice(down, shape, (run, cut, every)) for run in mine]",
        BF16,
        "bf16 matrices are stored [in, out]",
    ),
    Mutant(
        "kernels/reference.py",
        "gate, up = x[..., 0::2].float(), x[..., 1::2].float()",
        "up, gate = x[..., 0::2].float(), x[..., 1::2].float()",
        REFERENCE,
        "gate comes before up",
    ),
    # MXFP4.
    Mutant(
        "kernels/mxfp4.py",
        "torch.stack((values[byte & 15], values[byte >> 4]), dim=1)",
        "torch.stack((values[byte >> 4], values[byte & 15]), dim=1)",
        MXFP4,
        "the low nibble comes first",
    ),
    Mutant("kernels/mxfp4.py", "[..., None] - 127", "[..., None] - 128", MXFP4, "the scales' bias"),
    Mutant(
        "kernels/mxfp4.py",
        "packed.scales.to(torch.int32)[..., None]",
        "packed.scales.to(torch.int32).roll(1, -2)[..., None]",
        MXFP4,
        "blocks run along the input: a scale belongs to its own row",
    ),
    Mutant(
        "kernels/mxfp4.py",
        "_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)",
        "_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5)",
        MXFP4,
        "e2m1's values",
    ),
    # Sharding.
    Mutant(
        "parallelism/layers.py",
        "part(name, (heads,), 0, place.layout.heads(heads))",
        "part(name, (heads,), 0, (0, heads // place.layout.tp))",
        SHARES,
        "sinks are cut like the heads",
    ),
    Mutant(
        "parallelism/layers.py",
        "mine = (0, outputs if place.layout.rank == 0 else 0)",
        "mine = (0, outputs)",
        SHARES,
        "the output projection's bias counts once",
    ),
    Mutant(
        "parallelism/layout.py",
        "return self.expert_parallel or self.rank == 0",
        "return True",
        TWO_RANKS,
        "the down projection's bias counts once",
    ),
    Mutant(
        "parallelism/layout.py",
        "return _even(count, count, self.rank * count // self.tp)",
        "return _even(count, count, self.rank % count)",
        "tests/test_layout.py::test_query_heads_meet_their_kv_head",
        "which KV head a rank holds when there are fewer than ranks",
    ),
    Mutant(
        "parallelism/exchange.py",
        "for part in parts:",
        "for part in reversed(parts):",
        EXCHANGE,
        "sums are added in the order of ranks, whichever way the rows went",
    ),
    Mutant(
        "parallelism/exchange.py",
        "total = sums.new_zeros(mine, sums.shape[1], dtype=torch.float32)",
        "total = sums.new_full((mine, sums.shape[1]), -0.0, dtype=torch.float32)",
        EXCHANGE,
        "sums start from +0, which a rank without a token's experts adds",
    ),
    Mutant(
        "parallelism/experts.py",
        "turn = known.sum(-1, keepdim=True) % copies[known]",
        "turn = torch.arange(len(ids), device=ids.device)[:, None] % copies[known]",
        EXCHANGE,
        "the copy that serves a token does not depend on its batch",
    ),
    Mutant(
        "parallelism/experts.py",
        "experts[expert] += count",
        "experts[expert] = count",
        EXCHANGE,
        "the pairs of all copies are the expert's",
    ),
    Mutant(
        "parallelism/experts.py",
        "return padded.to(ids), copies.to(ids.device)",
        "return padded.to(ids.device), copies.to(ids.device)",
        EXCHANGE,
        "slots have the dtype of the router's ids, which kernels are compiled for",
    ),
    Mutant(
        "workers/rank.py",
        "room = self._free() - others - (self._spec.kv_cache_memory or 0)",
        "room = self._free() - (self._spec.kv_cache_memory or 0)",
        "tests/test_expert_load.py::test_more_copies_than_there_is_memory_for",
        "experts are not alone in memory",
    ),
    Mutant(
        "workers/recording.py",
        "found.check(_config(Path(spec.model)), *shape, ranks)",
        "found.check(found.config, *shape, ranks)",
        "tests/test_expert_load.py::test_a_placement_that_cannot_be_served_is_refused_before_ray_starts",
        "a placement is for one model",
    ),
    Mutant(
        "workers/rounds.py",
        "if len(tokens) < len(self._said) or not any(tokens):",
        "if not any(tokens):",
        "tests/test_rounds.py::TestProtocol",
        "a round waits for every engine",
    ),
    Mutant(
        "parallelism/experts.py",
        "pairs = (2 * first, 2 * last)",
        "pairs = (first, last + intermediate - (last - first))",
        SHARES,
        "a cut through the experts takes whole pairs of gate and up",
    ),
    Mutant(
        "parallelism/layers.py",
        "self._group.all_reduce(x.masked_fill_(~mine[:, None], 0))",
        "self._group.all_reduce(x)",
        TWO_RANKS,
        "an embedding counts on the one rank that has it",
    ),
    Mutant(
        "parallelism/group.py",
        "self._in_order = self.size > 2 and",
        "self._in_order = self.size > 4 and",
        "tests/test_parallel.py::test_four_ranks_sum_in_the_order_of_ranks",
        "a sum's order must not depend on its place",
    ),
    # The same token in other company.
    Mutant(
        "kernels/exact.py",
        "    return torch.cat([f(tile) for tile in x.split(ROWS)])[:count]",
        "    return f(x[:count])",
        COMPANY,
        "products in fixed tiles",
    ),
    Mutant(
        "workers/sampler.py",
        "keys = _mix64(self._key[slots] + positions.astype(np.uint64))",
        "keys = _mix64(self._key[slots] + slots.astype(np.uint64))",
        "tests/test_model.py::test_tokens_survive_preemption_and_chunking[reference]",
        "noise depends on the position",
    ),
    Mutant(
        "workers/runner.py",
        "(starts + counts)[samples]",
        "starts[samples]",
        "tests/test_model.py::test_tokens_survive_preemption_and_chunking[reference]",
        "noise does not depend on the chunk in which a prompt ended",
    ),
    Mutant(
        "workers/blocks.py",
        "return max(0, position - group.size + 1)",
        "return max(0, position - group.size + 2)",
        "tests/test_blocks.py::test_ledger_equals_the_formula",
        "a page leaves the window when no query sees it",
    ),
    Mutant(
        "workers/blocks.py",
        "limit = min(len(hashes), (num_tokens - 1) // self.block_size)",
        "limit = len(hashes)",
        "tests/test_blocks.py::test_prefix_hits",
        "a hit leaves at least one token to compute",
    ),
    Mutant(
        "workers/sequence.py",
        "if generated > least",
        "if generated",
        "tests/test_scheduler.py::test_traffic",
        "min_tokens",
    ),
    # Grammars.
    Mutant(
        "workers/scheduler.py",
        "chunk.stop if seq.grammar else seq.limit - 1",
        "seq.limit - 1",
        "tests/test_scheduler.py::test_traffic",
        "no mask can be made before the last token is known",
    ),
    Mutant(
        "workers/scheduler.py",
        "if seq.sampling.penalised or seq.grammar else []",
        "if seq.sampling.penalised else []",
        "tests/test_scheduler.py::test_traffic",
        "a sequence that comes back must be walked through its grammar again",
    ),
    Mutant(
        "workers/sampler.py",
        "if kept.any():",
        "if True:",
        "tests/test_structure.py::test_an_end_is_put_off_where_the_grammar_leaves_it_open",
        "min_tokens must leave what a grammar commands",
    ),
    Mutant(
        "workers/grammar.py",
        'private.get(token["content"], token["content"])',
        'token["content"]',
        "tests/test_structure.py::test_a_document_may_spell_a_control_token",
        "a document's text became a control token",
    ),
    # Reading.
    Mutant(
        "workers/sampler.py",
        ".log_softmax(-1, dtype=torch.float32)",
        ".log_softmax(-1).float()",
        "tests/test_logprobs.py::test_many_rows_are_computed_in_parts",
        "log probabilities in bf16",
    ),
    Mutant(
        "workers/runner.py",
        "self._sampler.logprobs(logits, slots, tokens)",
        "self._sampler.logprobs(self._sampler._adjusted(logits, slots, slots), slots, tokens)",
        "tests/test_logprobs.py::test_they_are_those_of_the_models_own_logits",
        "log probabilities of what sampling has changed",
    ),
    Mutant(
        "workers/scheduler.py",
        "and hashes[hit] in filling:",
        "and False:",
        "tests/test_scheduler.py::test_choices_of_one_prompt_compute_it_once[48-1]",
        "choices of one prompt that each compute it",
    ),
    Mutant(
        "workers/weights.py",
        "if first < 0 or 8 + length + last > size:",
        "if first < 0:",
        "tests/test_weights.py::test_faulty_files_are_named[truncate]",
        "a truncated file",
    ),
    Mutant(
        "workers/weights.py",
        "if found.shape != part.shape:",
        "if prod(found.shape) != prod(part.shape):",
        "tests/test_weights.py::test_faulty_tensors_are_named",
        "another shape of the same size",
    ),
)
