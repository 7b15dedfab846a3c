"""The model card's own programs run, unchanged but for the model's name, on folders of ours."""

import importlib.util

import pytest
from transformers import AutoTokenizer, MistralConfig

from starling.data.chat import FORMATS, jinja_template
from starling.data.openchat import openchat_tokenizer
from starling.data.records import Message
from starling.data.tokenizer import save_tokenizer
from starling.models.interfaces import Request, Sampling
from starling.models.local import load_local

pytestmark = pytest.mark.real_data

needs_vocabulary = pytest.mark.skipif(
    importlib.util.find_spec("mistral_common") is None,
    reason="mistral-common is not installed: it holds Mistral's vocabulary file",
)


@needs_vocabulary
@pytest.mark.parametrize("with_config", [False, True])
def test_the_cards_token_ids_are_those_of_our_openchat_folder(run_card, tmp_path, with_config):
    folder = tmp_path / "openchat"
    save_tokenizer(openchat_tokenizer(), folder, template=jinja_template(FORMATS["openchat"]))
    if with_config:
        # transformers then knows a Mistral, and has tokenizer classes of its own for it.
        MistralConfig(vocab_size=32002).save_pretrained(folder)
    names = run_card("tokens.py", "openchat/openchat-3.5-0106", folder)
    # The program's own assertions held; its last list stands for them.
    assert names["tokens"][:3] == [1, 7596, 1247]


def test_the_cards_usage_runs_on_what_the_ppo_stage_wrote(run_card, ppo_model, capsys):
    capsys.readouterr()
    names = run_card("usage.py", "Nexusflow/Starling-LM-7B-beta", ppo_model)
    printed = capsys.readouterr().out

    question = "Hello, how are you?"
    local = load_local(str(ppo_model))
    messages = (Message(role="user", content=question),)
    prompt = local.generation_request(Request("q", messages, Sampling(1))).prompt_ids
    # The card counts the prompt into its 256 tokens.
    sampling = Sampling(256 - len(prompt), temperature=0.0)
    [reply] = local.respond([Request("q", messages, sampling)])
    tokenizer = AutoTokenizer.from_pretrained(ppo_model)
    whole = tokenizer.decode([*prompt, *reply.ids], skip_special_tokens=True)
    assert whole.startswith(f"GPT4 Correct User: {question}GPT4 Correct Assistant:")
    assert f"Response: {whole}\nMulti-turn conversation response:" in printed

    history = "GPT4 Correct User: HelloGPT4 Correct Assistant: GPT4 Correct User: How are you today"
    assert f"Multi-turn conversation response: {history}" in printed
    coding = "Code User: Implement quicksort using C++Code Assistant:"
    assert f"Coding conversation response: {coding}" in printed
    assert str(names["response"]).startswith(coding)
