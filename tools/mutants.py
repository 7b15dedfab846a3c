"""The mutants of `mutate.py`, without the reward stage's and PPO's maths (`mutants_*.py`)."""

# By file: the tests that must notice, and changes that leave the code running but wrong.
CHANGES = {
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
        ("np.sqrt((deviations**2).sum())", "np.sqrt((deviations**2 / sizes).sum())"),
        ("np.clip(mean + ends, lowest, highest).tolist()", "(mean + ends).tolist()"),
        ("n=int(counts.sum()), num_failed=num_failed", "n=int(counts.sum())"),
    ],
    ("feedback/tallies.py", "tests/feedback/test_audit.py"): [
        ("(one[0] > other[0]) ==", "(one[0] < other[0]) =="),
        ("values.count(v) + 1) / 2", "values.count(v)) / 2"),
        ("[] if agreement is None else [agreement]", "[agreement] if agreement else []"),
        ("by=answer.finish_reason is not None", "by=True"),
        ("                if answer.rank is None:", "                if False:"),
        ('self.failed[*group, "good_natured"] += 1', "pass"),
        ('self.failed[*table, "places", str(place), name] += 1', "pass"),
        ('self.failed[*table, "way_to_last"] += 1', "pass"),
        ("+= not values and len(line", "+= 0 and len(line"),
        ("by=shares_of_win(ranks)[index]", "by=ranks[index] == 1"),
        ("[(place - 1) / (len(ranks) - 1)]", "[place / len(ranks)]"),
    ],
    ("feedback/findings.py", "tests/feedback/test_audit.py"): [
        ('tau["high"] < AGREEING', 'tau["mean"] < AGREEING'),
        ("UNREADABLE, SPOILED = 0.01, 0.1", "UNREADABLE, SPOILED = 0.5, 0.1"),
        ("UNREADABLE, SPOILED = 0.01, 0.1", "UNREADABLE, SPOILED = 0.01, 0.9"),
        ("LENGTH_DECIDES = 0.6", "LENGTH_DECIDES = 0.64"),
        ("AGREEING = 0.5", "AGREEING = 0.3"),
        ("TIED = 0.5", "TIED = 0.8"),
        ("tied > TIED * pairs", "tied >= TIED * pairs"),
        ("share > SPOILED,", "share >= SPOILED,"),
        ('is_concern = (ranks[name]["high"] or mean) < mean', "is_concern = True"),
        ('is_concern = (ranks[name]["high"] or mean) < mean', "is_concern = False"),
        ("wins > 0 or not is_last", "wins > 0"),
        ("wins > 0 or not is_last", "wins > 1 or not is_last"),
        ('way["low"] > 0.5', 'way["mean"] > 0.5'),
        ("1 - 0.05 ** (1 / n)", "0.05 ** (1 / n)"),
        ("if missed > SPOILED", "if missed > 0"),
        ('"logits" if kind == "logits" else strategy', "strategy"),
        ('about.get("kind", about.get("judge"))', 'about.get("judge")'),
        ("if of < given:", "if False:"),
        ('": none seen, though the', '": none; the'),
    ],
    ("feedback/audit.py", "tests/feedback/test_audit.py"): [
        ("iter_json(beside, check_judgment)", "iter_json(beside)"),
        (">= SMALLEST_EXPECTED * len(shares)", ">= SMALLEST_EXPECTED"),
    ],
    ("feedback/canaries.py", "tests/feedback/test_canaries.py"): [
        (
            "ranking.ranks.index(max(ranking.ranks))",
            "ranking.ranks.index(min(ranking.ranks))",
        ),
    ],
    ("judging/refusals.py", "tests/judging/test_refusals.py"): [
        ("(?!help but", "(?!help and"),
        ("recommend[^.,;!?", "recommend[^.;!?"),
    ],
    # What a resumed run would do otherwise than an undisturbed one.
    ("models/training.py", "tests/resume/test_kill_and_resume.py"): [
        ('self._cut_back(snapshot.state["metrics_offset"])', "pass"),
        ("step % self._every == 0 or stop.signal_number is not None", "step % self._every == 0"),
    ],
    ("feedback/run.py", "tests/feedback/test_feedback_run.py"): [
        ("left_by_a_kill.unlink()", "pass"),
        ("if _model(each) == _model(judge)]", "if False]"),
        ('return (section.url or "").rstrip("/"), section.model', 'return "", section.model'),
        ("is_hopeless = not has_ranked and", "is_hopeless = False and"),
        ("is_hopeless = not has_ranked and", "is_hopeless ="),
        (">= HOPELESS", ">= 1"),
        ("range(min(size, FIRST_BATCH), len(prompts), size)", "range(size, len(prompts), size)"),
        ("if most_places == 1:", "if False:"),
        ("max(0, k - len(prompt.answers))", "answers"),
        ("if k >= 2:", "if k >= 0:"),
    ],
    ("feedback/candidates.py", "tests/feedback/test_feedback_run.py"): [
        ("len(prompt.answers) + before + index >=", "before + index >="),
        ("len(prompt.answers) + before + index >=", "len(prompt.answers) + index >="),
    ],
    ("feedback/prompts.py", "tests/feedback/test_prompts_prepared.py"): [
        ('rules.duplicates == "nectar"', "True"),
        ("min(ngram, max(SHORTEST_RUN, len(normalised_words(turn))))", "ngram"),
        ("max(SHORTEST_RUN, len(normalised_words(turn)))", "len(normalised_words(turn))"),
        (
            "least <= sum(map(len, _texts(each))) <= longest",
            "least < sum(map(len, _texts(each))) <= longest",
        ),
        (
            "taken[name] < most[name] for name in capped",
            "taken[name] <= most[name] for name in capped",
        ),
        ("(len(first) + len(second) - shared)", "(len(first) + len(second))"),
        ("for run in _runs(words, 3)}", "for run in _runs(words, 2)}"),
        ('or {" ".join(words) or text}', 'or {" ".join(words)}'),
        ("for index in sorted(drawn)]", "for index in drawn]"),
        ("if named.setdefault(prompt.id, key) != key:", "if False:"),
        ("prompt.checks])", "None])"),
    ],
    ("data/nectar.py", "tests/feedback/test_prompts_prepared.py"): [
        ("_folded(each.content).split()", "each.content.split()"),
        ('" ".join(_folded(each.content).split())', "_folded(each.content)"),
    ],
    ("data/nectar.py", "tests/data/test_nectar.py"): [
        ('in "LMN"', 'in "LN"'),
        (' and not "\\ufe00" <= character <= "\\ufe0f"', ""),
        ("_folded(text)))) or text", "_folded(text))))"),
        ("if split_nectar_prompt(text) == row.messages:", "if split_nectar_prompt(text):"),
        ("            sink.truncate()\n", ""),
        ("sample is not None and sample < 1", "False"),
        ("target.suffix not in", "target.name in"),
    ],
    ("data/pairs.py", "tests/data/test_pairs.py"): [
        ("low == high + 1", "low >= high + 1"),
        ("high == 1)", "high <= 2)"),
        ("num_ranked + 1 if rank is None", "0 if rank is None"),
        ('f"pairs/{ranking.id}"', '"pairs"'),
        ("per_prompt < 1", "per_prompt < 0"),
    ],
    ("data/records.py", "tests/data/test_records.py"): [
        ("if type(value) is int else value", "if isinstance(value, int) else value"),
    ],
    ("base/spending.py", "tests/base/test_spending.py"): [
        (">= self._max_usd", "> self._max_usd"),
        ("tokens >= self._max_tokens", "tokens > self._max_tokens"),
        ("prompt_tokens * price.input +", "prompt_tokens * price.output +"),
    ],
    ("judging/recorded.py", "tests/judging/test_recorded.py"): [
        (
            "self._charge(calls=1, prompt_tokens=read, response_tokens=written)",
            "self._charge(calls=1)",
        ),
        (
            "has_reply = isinstance(outcome, (Reply, Unusable))",
            "has_reply = isinstance(outcome, Reply)",
        ),
        ("read and (written or isinstance(outcome, Unusable))", "read and written"),
        ("read and (written or", "(written or"),
        ("            return self._has_room()", "            return True"),
        ("if not self._spending.open(", "if self._spending.open("),
        ("[written.pop(outcome.request_id, 0) :]", "[:]"),
        ("                elif self._has_room():", "                else:"),
        ("        if self.watch is not None:\n            self.watch()\n", ""),
    ],
    ("judging/recorded.py", "tests/resume/test_kill_calls.py"): [
        (
            "                    self._ledger.write(sent=[call])\n"
            "                    flying[call.request.id] = call\n"
            "                    yield call.request\n",
            "                    flying[call.request.id] = call\n"
            "                    yield call.request\n"
            "                    self._ledger.write(sent=[call])\n",
        ),
        (
            "                self._ledger.write(ended=[Ended(call, outcome, failed)])\n"
            "                self._charge_new(outcome, failed)\n"
            "                yield from self._used_all(found)\n"
            "                yield self._used(outcome, is_new=True)\n",
            "                yield from self._used_all(found)\n"
            "                yield self._used(outcome, is_new=True)\n"
            "                self._ledger.write(ended=[Ended(call, outcome, failed)])\n"
            "                self._charge_new(outcome, failed)\n",
        ),
    ],
    ("judging/ledger.py", "tests/judging/test_recorded.py"): [
        ('"failed" if usage is None', '"failed" if reply is None'),
        ("written if reply else written or None", "written"),
        ("SELECT sum(times), 0, 0, 0", "SELECT 0, 0, 0, 0"),
        ("SELECT ?1, count(*) + 1, ?2", "SELECT ?1, 1, ?2"),
        ("sum(attempts.prompt_tokens)", "0"),
        ("DO UPDATE SET times = times + 1", "DO UPDATE SET times = times"),
    ],
    ("models/endpoint.py", "tests/models/test_endpoint_stream.py"): [
        ("retries -= not outcome.asks_anew", "retries -= 1"),
    ],
    ("models/endpoint.py", "tests/models/test_endpoint.py"): [
        ("failed.append(outcome.reason)", "failed.append(reason)"),
        (
            "if ask_leave is not None and not await ask_leave(outcome.reason):",
            "if ask_leave is not None and await ask_leave(outcome.reason):",
        ),
        (
            "                yield event.result()\n                num_running += send(1)\n",
            "                num_running += send(1)\n                yield event.result()\n",
        ),
        (
            "(openai.APIConnectionError, aiohttp.ClientError) as error",
            "openai.APIConnectionError as error",
        ),
    ],
    ("models/loop.py", "tests/models/test_endpoint.py"): [
        (
            "resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))",
            "resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))",
        ),
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
    ("judging/kwise.py", "tests/judging/test_kwise.py"): [
        ("order = tuple(rng.sample(range(k), k))", "order = tuple(range(k))"),
        ('rf"^{LABEL}([A-Z]', 'rf"^.*?([A-Z]'),
        ('{TAIL}$", re.MULTILINE)', '.*$", re.MULTILINE)'),
        (" or _SENTENCE.search(text.lower())", ""),
        ("(yes|no)\\b|[ .*]*$)", "(yes|no)?)"),
        ("conversation(?!\\s*\\?)", "conversation"),
        ("(?:^|[.:!])[^\\w\\n.:!]*this is", "this is"),
    ],
    ("judging/rating.py", "tests/judging/test_rating.py"): [
        ("float(found[-1])", "float(found[0])"),
        ("_DOUBLE.findall(text) or _SINGLE", "_SINGLE"),
    ],
    ("judging/strategies.py", "tests/judging/test_strategies.py"): [
        ("order = start[by:] + start[:by]", "order = start"),
        ("((one, other), (other, one))]", "((one, other), (one, other))]"),
        ("if all(vote.ranks is not None for vote in pair)", "if any(v.ranks for v in pair)"),
        ("return len(reached) == k", "return len(reached) > 1"),
        ("if len(scores) < len(votes):", "if not scores:"),
        ("-(-repeats // k) * k if repeats > k else repeats", "repeats"),
        ("-(-repeats // k) * k if repeats > k else repeats", "-(-repeats // k) * k"),
        (" and tied not in compared:", " and False:"),
        (" and tied not in compared:", " and len(both) < k * (k - 1) // 2:"),
    ],
    ("base/rating.py", "tests/base/test_rating_maths.py"): [
        ("if ranking[other] >= rank)", "if ranking[other] > rank or other == item)"),
        ("expected = counts @ shares + prior * strengths", "expected = counts @ shares + prior"),
        ("- m * ties", "- ties"),
    ],
    ("judging/llm_judge.py", "tests/judging/test_llm_judge.py"): [
        ("if length + self._max_tokens <=", "if length <="),
        ("own_words(outcome.text, question.messages[-1].content)", "outcome.text"),
    ],
    ("judging/fences.py", "tests/judging/test_fences.py"): [
        ("{break_markers(text)}\\n", "{text}\\n"),
        ('return "" if is_quoted else found[0]', 'return ""'),
        ('_SPACING.sub("", found[0]) in shown', "found[0] in shown"),
        ("in shown and not _has_its_line(found)", "in shown"),
        ("is_short and bool(", "bool("),
        ("_LABEL.fullmatch(line) and _TAIL.fullmatch(after)", "_LABEL.fullmatch(line)"),
        ("_LABEL.fullmatch(line) and _TAIL.fullmatch(after)", "_TAIL.fullmatch(after)"),
        (r"(?![ \t]*(?:[*+-][ \t]+)?>)", ""),
        ("\\u201f\\u00ab\\u00bb", ""),
        ("+ NEVER_CLOSED", ""),
        ("LONGEST_LABEL = 200", "LONGEST_LABEL = 201"),
        ("LONGEST_LABEL = 200", "LONGEST_LABEL = 199"),
        ("(?=[^\\n]*{_NAMES})(?:", "(?:"),
        ("for kind in (_LIST, _INNERMOST)", "for kind in (_LIST,)"),
        ("</?(?i:s|", "</?(?:s|"),
    ],
    ("judging/logits.py", "tests/judging/test_logits.py"): [
        ("(*order[start:], *order[:start])", "(*order[:start], *order[start:])"),
        ("batch.lengths - 1]", "batch.lengths - 2]"),
        ("LOWEST + expected", "expected"),
    ],
}
