"""The mutants of the reward stage and of what trains it; see `mutants.py`."""

CHANGES = {
    ("reward/loss.py", "tests/reward/test_reward_loss.py"): [
        ("weight = weight * keep[:, None, :]", "weight = weight * 1"),
        ("other > stage", "other < stage"),
        ("share = 1 - nth", "share = 1 - 0 * nth"),
        ("diagonal=-1", "diagonal=0"),
        ('if ties == "breslow":', 'if ties == "":'),
        (
            "torch.where(is_ranked, terms, 0.0).sum(dim=1) / (keep.sum(dim=1) - 1)",
            "torch.where(is_ranked, terms, 0.0).sum(dim=1) / keep.sum(dim=1)",
        ),
        (
            "torch.where(is_ranked, terms, 0.0).sum(dim=1) / (keep.sum(dim=1) - 1)",
            "terms.sum(dim=1) / (keep.sum(dim=1) - 1)",
        ),
        ("weight.log()).logsumexp(dim=2)", "weight.log()).exp().sum(dim=2).log()"),
        ("is_pair = (better < worse) & keep[:, None, :]", "is_pair = better < worse"),
        ("(better[..., None] < middle)", "(better[..., None] <= middle)"),
        ("is_pair, -logsigmoid(-_gaps(scores, keep))", "is_pair, -logsigmoid(_gaps(scores, keep))"),
        ("is_pair.sum(dim=(1, 2)).clamp(min=1)", "(keep.sum(dim=1) - 1)"),
        ("terms, 0.0).sum(dim=1) / is_best.sum(dim=1)", "terms, 0.0).sum(dim=1)"),
        ("_kept(scores, keep).sum(dim=1).square()", "scores.sum(dim=1).square()"),
        ("(keep.sum(dim=1) < 2).any()", "(keep.sum(dim=1) < 1).any()"),
        (" or not is_ranked.any(dim=1).all()", ""),
        ("keep & (ranks != UNRANKED)", "keep & (ranks == ranks)"),
        ("kept[:, None, :] - kept[:, :, None]", "kept[:, :, None] - kept[:, None, :]"),
    ],
    ("reward/evaluate.py", "tests/reward/test_reward_evaluate.py"): [
        ("worse is None or better < worse", "worse is not None and better < worse"),
        ("return 0.5 + 0.5 * np.sign(gaps)", "return 1.0 * (gaps > 0)"),
        ("levels[j] - levels[i])", "j - i)"),
        ("last + 1 if rank is None", "last if rank is None"),
        ("pairs.accuracy(pairs.longer > 0, seed)", "pairs.accuracy(pairs.longer >= 0, seed)"),
        (
            "[(row.standing, row.chars) for row in answers]",
            "[(row.scores, row.chars) for row in answers]",
        ),
        ("_calibration(scale * pairs.gap)", "_calibration(pairs.gap)"),
        ("np.log2(np.arange(len(gains)) + 2)", "np.log2(np.arange(len(gains)) + 1.5)"),
        ("math.sqrt(np.prod([(each**2).sum() for each in signs]))", "signs[0].size"),
        (
            "math.comb(k - 1 - place, n - 1) / math.comb(k, n)",
            "math.comb(k - place, n) / math.comb(k, n)",
        ),
        ("np.stack([x - x.mean(), y - y.mean()])", "np.stack([x, y])"),
        ("np.logaddexp(0, -gaps)", "np.logaddexp(0, gaps)"),
        ("min(other[i], other[j]) < math.inf", "True"),
        ("(1 + math.sqrt(max(0.0, 2 * agreement", "(1 + (max(0.0, 2 * agreement"),
        ("members[pair.subset or ", "members[pair.id or "),
    ],
    ("reward/normalise.py", "tests/reward/test_reward_train.py"): [
        ("found.raw_score for found", "found.score * 2 for found"),
        ("raw.std(correction=0)", "raw.std(correction=0) ** 2"),
        ("chat_format=inputs.policy_format", "chat_format=None"),
        ("if not std > 1e-5", "if not std > 0"),
    ],
    ("reward/train.py", "tests/reward/test_reward_train.py"): [
        ("(counts / weight)", "(counts / len(rows))"),
        (
            "(weights * ranking_loss(scores, ranks, keep)).sum()",
            "ranking_loss(scores, ranks, keep).sum()",
        ),
        ("if parameter not in head:", "if parameter in head:"),
        ("step < section.head_warmup", "step <= section.head_warmup"),
        ("scores.isfinite().all(dim=1)", "scores.isinf().all(dim=1) | True"),
        ("find_codec(inputs.policy, inputs.policy_format)", "pass"),
    ],
    ("reward/dataset.py", "tests/reward/test_reward_dataset.py"): [
        ("if row.key in apart]", "if row.key not in apart]"),
        ("key=dedup_key(ranking.messages)", "key=ranking.id"),
        (
            'order = permutation(len(prompts), seed, "reward/split", 0)',
            "order = list(range(len(prompts)))",
        ),
    ],
    ("models/parallel.py", "tests/models/test_parallel.py"): [
        ("dist.all_reduce(value)", "pass"),
        ("[(batches[-1], False)] * missing", "[(batches[-1], True)] * missing"),
        ("enabled=self.is_bfloat16", "enabled=False"),
        ("partial(checkpoint, block.forward, use_reentrant=False)", "block.forward"),
        ("return merged(model)", "return model"),
    ],
    ("models/adapters.py", "tests/models/test_adapters.py"): [
        ("blocks[-section.top_layers :]", "blocks[: section.top_layers]"),
        ("torch.manual_seed(seed)", "pass"),
        ("adapted.merge(safe_merge=True)", "pass"),
        ("score_head(model).requires_grad_(True)", "pass"),
    ],
    ("base/training_state.py", "tests/resume/test_ranks.py"): [
        ("tensor.clone() if is_counter else shared_like(parameter, tensor)", "tensor.clone()"),
    ],
    ("models/reward_model.py", "tests/models/test_reward_scores.py"): [
        ("(raw_score - self.mean) / self.std", "raw_score / self.std - self.mean"),
        ("order.argsort()", "order"),
        ("ids[: len(ids) - mask[::-1].index(True)]", "ids"),
        (
            "found[number] = [next(scores) for _ in row]",
            "found[number] = [next(scores) for _ in row][::-1]",
        ),
    ],
}
