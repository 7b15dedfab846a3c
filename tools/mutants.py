"""The mutants that `mutate.py` applies: changes that leave the code running but wrong."""

# By file: the tests that must notice, and changes that leave the code running but wrong.
CHANGES = {
    ("reward/loss.py", "tests/reward/test_reward_loss.py"): [
        ("weight = weight * keep[:, None, :]", "weight = weight * 1"),
        ("other > stage", "other < stage"),
        ("share = 1 - nth", "share = 1 - 0 * nth"),
        ("diagonal=-1", "diagonal=0"),
        ("remaining - scores.float(), 0.0", "scores.float() - remaining, 0.0"),
        ("(num_kept - 1)", "num_kept"),
        ("terms.sum(dim=1) / (num_kept - 1)", "terms.mean(dim=1)"),
        ("(num_kept < 2)", "(num_kept < 1)"),
        (" or not is_ranked.any(dim=1).all()", ""),
        ("keep & (ranks != UNRANKED)", "keep & (ranks == ranks)"),
        ("weight.log()).logsumexp(dim=2)", "weight.log()).exp().sum(dim=2).log()"),
    ],
    ("ppo/kl.py", "tests/ppo/test_kl.py"): [
        ("return logprobs - ref_logprobs", "return ref_logprobs - logprobs"),
        ("torch.exp(-difference)", "torch.exp(difference)"),
        ("- 1 + difference", "- 1 - difference"),
        (
            "masked_sum(kl, response_mask, dim=1)",
            "masked_sum(kl, response_mask, dim=1) / response_mask.sum(dim=1)",
        ),
        ("measured / self.target - 1", "1 - measured / self.target"),
        ("measured / self.target - 1", "measured - self.target"),
        ("-0.2), 0.2)", "-0.2), 0.3)"),
        ("-0.2), 0.2)", "-0.3), 0.2)"),
        ("error * episodes / self.horizon", "error / self.horizon"),
    ],
    ("ppo/advantage.py", "tests/ppo/test_advantage.py"): [
        ("response_mask, -kl_coef * kl", "response_mask, kl_coef * kl"),
        ("torch.where(response_mask, -kl_coef * kl, 0.0)", "-kl_coef * kl"),
        ("positions, -1).argmax", "positions, -1).argmin"),
        ("positions, -1).argmax", "-positions, -99).argmax"),
        ("rewards.scatter_add", "rewards.scatter"),
        ("+ gamma * next_value - values", "- gamma * next_value + values"),
        ("+ gamma * next_value -", "+ next_value -"),
        ("gamma * gae_lambda * next_advantage", "gae_lambda * next_advantage"),
        ("gamma * gae_lambda * next_advantage", "gamma * next_advantage"),
        ("next_value = torch.where(keep, values[:, t], next_value)", "next_value = values[:, t]"),
        ("torch.where(keep, advantage, next_advantage)", "advantage"),
        ("torch.where(keep, advantage, 0.0)", "advantage"),
        ("response_mask, advantages + values, 0.0", "response_mask, advantages - values, 0.0"),
        ("(values - masked_mean(values, mask)) *", "values *"),
        ("masked_var(values, mask) +", "masked_var(values, mask) ** 2 +"),
        ("torch.where(mask, scaled, 0.0)", "scaled"),
    ],
    ("ppo/loss.py", "tests/ppo/test_ppo_loss.py"): [
        (
            "torch.exp(torch.where(response_mask, logprobs - old_logprobs, 0.0))",
            "torch.exp(torch.where(response_mask, old_logprobs - logprobs, 0.0))",
        ),
        (
            "torch.exp(torch.where(response_mask, logprobs - old_logprobs, 0.0))",
            "torch.exp(logprobs - old_logprobs)",
        ),
        ("plain = -advantages * ratio", "plain = advantages * ratio"),
        ("1 - clip_range, 1 + clip_range)\n    loss", "0, 1 + clip_range)\n    loss"),
        ("1 - clip_range, 1 + clip_range)\n    loss", "1 - clip_range, 99)\n    loss"),
        (
            "response_mask, torch.maximum(plain, clipped)",
            "response_mask, torch.minimum(plain, clipped)",
        ),
        ("response_mask, torch.maximum(plain, clipped)", "response_mask, clipped"),
        ("old_values + (values - old_values).clamp", "values.clamp"),
        ("0.5 * torch.maximum(plain, clipped)", "torch.maximum(plain, clipped)"),
        ("0.5 * torch.maximum(plain, clipped)", "0.5 * torch.minimum(plain, clipped)"),
        (
            "torch.where(response_mask, 0.5 * torch.maximum(plain, clipped), 0.0)",
            "0.5 * torch.maximum(plain, clipped)",
        ),
    ],
    ("base/masked.py", "tests/base/test_masked.py"): [
        ("_kept(values, mask, None).sum() / mask.sum()", "_kept(values, mask, None).mean()"),
        ("return kept.sum() if dim is None else kept.sum(dim)", "return kept.sum()"),
        ("torch.where(mask, values, zeros)", "(values * mask)"),
        ("torch.where(mask, values, zeros)", "torch.where(mask, zeros, values)"),
        ("(kept - kept.sum() / mask.sum())", "(kept - kept.mean())"),
        ("if not has_kept:", "if False:"),
        ("mask.any() if dim is None else mask.any(dim).all()", "mask.any()"),
        (".to(torch.promote_types(values.dtype, torch.float32))", ""),
    ],
    ("base/estimate.py", "tests/base/test_estimate.py"): [
        ("range(array.size) if clusters is None else clusters", "range(array.size)"),
        ("tail = (1 - LEVEL) / 2", "tail = 1 - LEVEL"),
        ("weights=array - mean)", "weights=array)"),
        ("/ sizes[drawn].sum(axis=1)", "/ num_clusters"),
        ("if len(sizes) < 2:", "if False:"),
    ],
    ("ppo/train.py", "tests/ppo/test_rollout_and_update.py"): [
        ("int(rollout.response_mask[minibatch].sum())", "len(minibatch)"),
        (
            "rows.response_mask, temperature=section.temperature",
            "rows.response_mask, temperature=1.0",
        ),
        ("section.value_coef * value.loss.sum()", "value.loss.sum()"),
        ('f"ppo/minibatch/{step}", epoch)', 'f"ppo/minibatch/{step}", 0)'),
        ("estimated.advantages[indices, :width]", "estimated.advantages[: len(indices), :width]"),
    ],
    ("ppo/rollout.py", "tests/ppo/test_rollout_and_update.py"): [
        ("mask, temperature=temperature))\n    return", "mask, temperature=1.0))\n    return"),
        ("(is_finished, scores, torch", "(is_finished, scores, scores + torch"),
    ],
    ("ppo/actor_critic.py", "tests/ppo/test_rollout_and_update.py"): [
        ("predicting_states(states).float()", "states.float()"),
        ("nn.init.zeros_(self.value_head.weight)", "nn.init.ones_(self.value_head.weight)"),
        ("hidden if self.trunk is None else", "hidden if True else"),
    ],
    # What a resumed run would do otherwise than an undisturbed one.
    ("ppo/train.py", "tests/resume/test_kill_and_resume.py"): [
        ('snapshot.state["extra"].get("kl_coef", section.kl_coef)', "section.kl_coef"),
        ('Selection.resume(snapshot.state["extra"], snapshot.tensors)', "Selection()"),
    ],
    ("models/training.py", "tests/resume/test_kill_and_resume.py"): [
        ('self._metrics.cut_back(snapshot.state["metrics_offset"])', "pass"),
        ("step % self._every == 0 or stopping", "step % self._every == 0"),
    ],
    ("data/template.py", "tests/data/test_template.py"): [
        ("if any(not message.content for message in messages):", "if False:"),
        ("parts = parts[: answer + 1]", "parts = parts[:answer]"),
        ("if same and rendered.startswith(text + literal, place):", "if same:"),
        (
            "blank = blank and marker is None and literal.isspace()",
            "blank = blank and marker is None",
        ),
        (
            "if blank and marker in self._ends and marker is not None:",
            "if blank and marker is not None:",
        ),
    ],
    ("data/tokenizer.py", "tests/data/test_template.py"): [
        (
            "if token.content in template and _NO_WORD.search(token.content)",
            "if token.content in template",
        ),
        (
            '{names.get(text, text): i for text, i in model["vocab"].items()}',
            'dict(model["vocab"])',
        ),
    ],
    ("data/tokenizer.py", "tests/data/test_tokenizer.py"): [
        ("if not token.special and _MARKER.fullmatch(token.content):", "if False:"),
        (
            "(max(start, end - 1) for start, end in encoding.offsets)",
            "(start for start, end in encoding.offsets)",
        ),
    ],
    ("data/tokenizer.py", "tests/data/test_chat_formats.py"): [
        ("whole[:1] == [self.bos_id]", "True"),
        ("taken = {end_id, eos, self.bos_id}", "taken = {end_id, eos}"),
    ],
    ("data/tokenizer.py", "tests/data/test_openchat.py"): [
        ("    if tokenizer.marker_id(openchat.END) == openchat.END_ID:", "    if False:"),
    ],
    ("data/openchat.py", "tests/data/test_openchat.py"): [
        ("(-piece.score, -cut, token_id,", "(token_id, -cut, token_id,"),
        ("(-piece.score, -cut, token_id,", "(-piece.score, cut, token_id,"),
        ("bool(normalizer.get(4, 1))", "bool(normalizer.get(4, 0))"),
    ],
    ("data/chat.py", "tests/data/test_chat_formats.py"): [
        ('turns = [*turns, "assistant"]', "turns = [*turns]"),
    ],
    ("data/templates/turns.jinja", "tests/data/test_chat_formats.py"): [
        ("(SPACE if prefix and message['content'] else '')", "(SPACE if prefix else '')"),
    ],
    ("models/loading.py", "tests/models/test_loading.py"): [
        ("not 0 <= end < rows", "not 0 <= end <= rows"),
        ('set(found["missing_keys"]) - new_weights', "set()"),
        ('sorted(found["mismatched_keys"])', "[]"),
        ("if highest >= rows:", "if highest > rows:"),
        ("if theirs != ours:", "if not theirs:"),
        ("if codec.end_id not in stop_ids:", "if not stop_ids:"),
        ("config.pad_token_id = tokenizer.pad_id", "config.pad_token_id = config.pad_token_id"),
        ('dtype=dtype if dtype == "auto" else getattr(torch, dtype)', 'dtype="auto"'),
        ('named = stored.get("auto_map")', "named = None"),
    ],
    ("models/published_reward.py", "tests/models/test_published_reward.py"): [
        ("weights_only=True", "weights_only=False"),
        (
            'key=lambda pair: pair[0].startswith("transformer.")',
            'key=lambda pair: not pair[0].startswith("transformer.")',
        ),
        ("min(MAX_LENGTH, limit)", "limit"),
    ],
    ("models/causal_lm.py", "tests/models/test_loading.py"): [
        (
            "ends = [codec.end_id, *sorted(codec.stop_ids - {codec.end_id})]",
            "ends = sorted(codec.stop_ids)",
        ),
    ],
    ("models/reward_model.py", "tests/models/test_published_reward.py"): [
        ("if item.finished and True in mask:", "if False:"),
    ],
    ("models/local.py", "tests/models/test_local.py"): [
        ('decode_response(ids).rstrip("\\ufffd")', "decode_response(ids)"),
        ("text[: min(places)] if places", "text[: max(places)] if places"),
        ("range(1, len(string)) if", "range(2, len(string)) if"),
        (
            "with contextlib.closing(decoded()) as tokens:",
            "with contextlib.nullcontext(list(decoded())) as tokens:",
        ),
    ],
    ("models/best_of.py", "tests/models/test_best_of.py"): [
        ("chosen = (max(", "chosen = (min("),
        ('finished=reply.finish_reason == "stop"', "finished=True"),
    ],
    ("models/completion.py", "tests/models/test_endpoint_ids.py"): [
        ("self._has_ids and choice.token_ids is not None", "True"),
        ("{*sampling.stop_ids, *(codec.stop_ids if codec else ())}", "set(sampling.stop_ids)"),
    ],
    ("models/completion.py", "tests/models/test_endpoint_stream.py"): [
        ("choice.finish_reason or self.finish_reason", "choice.finish_reason"),
    ],
    ("models/streaming.py", "tests/models/test_endpoint_stream.py"): [
        ("if self._answer.finish_reason is not None:", "if False:"),
    ],
    ("models/endpoint.py", "tests/models/test_endpoint_ids.py"): [
        ("mode=request.mode, generation_prompt=True", "generation_prompt=True"),
    ],
    ("serve/session.py", "tests/serve/test_session.py"): [
        ("self._context_length - kept_free", "self._context_length"),
        ("min(self.max_tokens, room)", "room"),
    ],
    ("serve/tokens.py", "tests/serve/test_tokens.py"): [
        ("before += ids\n", "before = ids\n"),
    ],
    ("data/gguf.py", "tests/models/test_gguf_engine.py"): [
        ("kind == CONTROL or _MARKER.fullmatch(pieces[i])", "kind == CONTROL"),
    ],
    ("models/gguf_engine.py", "tests/models/test_gguf_engine.py"): [
        (
            'samplers=["temperature", "top_k", "top_p"]',
            'samplers=["top_k", "top_p", "temperature"]',
        ),
        ("(known[token] - highest) / temperature -", "(known[token] - highest) -"),
        ("token in ends or", "token in self._codec.stop_ids or"),
        ('"gguf", index, len(ids))', '"gguf", 0, len(ids))'),
        ("self._free and self._room >= needed", "self._free"),
        (', "mirostat": 0', ""),
    ],
    ("models/sampling.py", "tests/models/test_sampling.py"): [
        ("near = (target - edges.gather(1, place) < margin)", "near = (target < 0)"),
        ("edges.gather(1, place + 1) - target < margin", "target < 0"),
        ("before >= top_p", "share >= top_p"),
    ],
    ("models/decoder.py", "tests/models/test_decoder.py"): [
        (
            "out |= columns <= positions[:, None] - window",
            "out |= columns < positions[:, None] - window",
        ),
        ("if not self._is_current():", "if False:"),
        ("ones.tril() & ~ones.tril(-window)", "ones.tril() & ~ones.tril(-window - 1)"),
    ],
    ("models/torch_engine.py", "tests/models/test_decoder.py"): [
        ("self.decoder = decoder_for(self.model)", "pass"),
    ],
    ("models/torch_engine.py", "tests/models/test_torch_engine.py"): [
        ("self.cache.copy(len(self.rows), [slot], last.position)", "pass"),
    ],
}
