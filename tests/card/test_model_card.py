"""The model card's own program runs, unchanged but for the model's name, on a folder of ours."""

import runpy

import pytest
from transformers import AutoTokenizer

from starling.data.records import Message
from starling.models.interfaces import Request, Sampling
from starling.models.local import load_local

NAME = "Nexusflow/Starling-LM-7B-beta"


@pytest.mark.real_data
def test_the_cards_usage_runs_on_a_saved_policy(test_data, policy_folder, tmp_path, capsys):
    usage = (test_data / "card" / "usage.py").read_text(encoding="utf-8")
    assert usage.count(f'"{NAME}"') == 2
    script = tmp_path / "usage.py"
    script.write_text(usage.replace(NAME, str(policy_folder)), encoding="utf-8")
    names = runpy.run_path(str(script))
    printed = capsys.readouterr().out

    question = "Hello, how are you?"
    local = load_local(str(policy_folder))
    messages = (Message(role="user", content=question),)
    prompt = local.generation_request(Request("q", messages, Sampling(1))).prompt_ids
    # The card counts the prompt into its 256 tokens.
    sampling = Sampling(256 - len(prompt), temperature=0.0)
    [reply] = local.respond([Request("q", messages, sampling)])
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    whole = tokenizer.decode([*prompt, *reply.ids], skip_special_tokens=True)
    assert whole.startswith(f"GPT4 Correct User: {question}GPT4 Correct Assistant:")
    assert f"Response: {whole}\nMulti-turn conversation response:" in printed

    history = "GPT4 Correct User: HelloGPT4 Correct Assistant: GPT4 Correct User: How are you today"
    assert f"Multi-turn conversation response: {history}" in printed
    coding = "Code User: Implement quicksort using C++Code Assistant:"
    assert f"Coding conversation response: {coding}" in printed
    assert names["response"].startswith(coding)
