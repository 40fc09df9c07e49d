"""Training on a teacher with another tokenizer: what aligns, what is refused, and that nothing else matters."""

import pytest
import torch
from datasets import Dataset

from trl_distill_plugins import DistillGKDConfig, DistillGKDTrainer, DistillSFTConfig, DistillSFTTrainer
from trl_distill_plugins.errors import ConfigError, DataError, TeacherError
from trl_distill_plugins.prompts.alignment import END, align
from trl_distill_plugins.prompts.token_bytes import token_bytes

SHARP = 8.0


@pytest.fixture
def teacher_of(tiny_causal_lm, tmp_path):
    """`teacher_of(tokenizer, seed)`: the folder of a model with that tokenizer; `place` moves each token's rows."""

    def make(tokenizer, seed=1, place=None):
        model = tiny_causal_lm(seed, hidden=48, vocab=len(tokenizer))
        model.lm_head.weight.data *= SHARP
        for layer in (model.model.embed_tokens, model.lm_head) if place is not None else ():
            layer.weight.data = torch.empty_like(layer.weight.data).index_copy(0, place, layer.weight.data)
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        folder = tmp_path / f"teacher-{'as-is' if place is None else 'moved'}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture
def train(rows, quiet, tiny_causal_lm, tiny_tokenizer):
    """`train(teacher, losses, **config)`: a trainer that has trained."""

    def run(teacher, losses=("forward_kl",), dataset=None, tokenizer=None, **config):
        tokenizer = tiny_tokenizer if tokenizer is None else tokenizer
        trainer = DistillSFTTrainer(
            model=tiny_causal_lm(0, vocab=len(tokenizer)),
            teacher_model=teacher,
            args=DistillSFTConfig(**quiet | {"losses": list(losses)} | config),
            train_dataset=rows if dataset is None else dataset,
            processing_class=tokenizer,
        )
        trainer.train()
        return trainer

    return run


@pytest.fixture(params=["wide", "piece"])
def foreign(request, wide_tokenizer, piece_tokenizer):
    return {"wide": wide_tokenizer, "piece": piece_tokenizer}[request.param]


def test_the_same_tokens_under_other_ids_train_as_with_one_tokenizer(
    train, teacher_of, logged, tiny_tokenizer, permuted_tokenizer
):
    names = tiny_tokenizer.convert_ids_to_tokens(range(len(tiny_tokenizer)))
    place = torch.tensor(permuted_tokenizer.convert_tokens_to_ids(names))
    losses = ["forward_kl", {"name": "jsd", "temperature": 2.0}, "universal_logit", "cross_entropy"]
    runs = [
        train(teacher_of(tokenizer, place=moved), losses, teacher_prompt_template="the fox : {input}")
        for tokenizer, moved in ((tiny_tokenizer, None), (permuted_tokenizer, place))
    ]
    assert runs[0].teacher.tokenizer is None
    assert runs[1].teacher.tokenizer is not None
    for name in ("loss", "loss/jsd", "loss/universal_logit", "teacher_kl", "teacher_entropy", "teacher_top1_agreement"):
        assert logged(runs[1], name) == pytest.approx(logged(runs[0], name), rel=1e-4)
    assert logged(runs[1], "aligned") == [1.0] * 3
    assert logged(runs[0], "aligned") == []


@pytest.mark.parametrize("template", [None, "the fox : {input}"])
def test_first_loss_is_the_kl_of_the_positions_that_align(template, foreign, train, teacher_of, logged, rows):
    few = rows.select(range(4))
    trainer = train(
        teacher_of(foreign), dataset=few, teacher_prompt_template=template, max_steps=1, learning_rate=0.0
    )  # fmt: skip
    own, student, teacher = trainer.processing_class, trainer.model, trainer.teacher.model
    tables = token_bytes(own), token_bytes(foreign)
    shared = [
        [[i for i, piece in enumerate(table) if piece == meaning] for table in tables]
        for meaning in sorted(set(tables[0]) & set(tables[1]) - {None})
    ]
    ends = {foreign.eos_token_id} | ({foreign.convert_tokens_to_ids("<turn>")} if foreign.chat_template else set())
    shared.append([[own.eos_token_id], sorted(ends)])
    if "<unk>" in foreign.get_vocab():  # a special token of one name
        shared.append([[own.unk_token_id], [foreign.unk_token_id]])
    total, aligned, count = 0.0, 0, 0
    for row in few:
        prompt = row["prompt"] if template is None else template.format(input=row["prompt"])
        sides = []
        for tokenizer, model, text in ((own, student, row["prompt"]), (foreign, teacher, prompt)):
            before = tokenizer(text)["input_ids"]
            answer = [*(i for i in _behind(tokenizer, row["completion"])), tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].double()
            sides.append((answer, logits.softmax(-1)))
        pairs = align(*([table[i] or END for i in side[0]] for table, side in zip(tables, sides, strict=True)))
        count += len(pairs)
        for position, other in enumerate(pairs):
            if other < 0:
                continue
            aligned += 1
            q, p = sides[0][1][position], sides[1][1][other]
            masses = [(p[theirs].sum(), q[ours].sum()) for ours, theirs in shared]
            masses.append(tuple(1 - sum(mass[side] for mass in masses) for side in (0, 1)))
            total += sum(float(a * (a / b).log()) for a, b in masses)
    assert logged(trainer, "loss")[0] == pytest.approx(total / count, rel=1e-4)
    assert logged(trainer, "teacher_kl")[0] == pytest.approx(total / aligned, rel=1e-4)
    assert logged(trainer, "aligned")[0] == pytest.approx(aligned / count)
    assert 0.2 < aligned / count < 1.0


def _behind(tokenizer, text):
    """Ids of a text that follows another, found by tokenising it behind one that merges with nothing."""
    before = tokenizer("\n", add_special_tokens=False)["input_ids"]
    both = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    assert both[: len(before)] == before
    return both[len(before) :]


@pytest.mark.parametrize("loss", ["forward_kl", "universal_logit"])
def test_a_run_learns_and_logs_the_share(loss, foreign, train, teacher_of, logged, rows):
    trainer = train(teacher_of(foreign), [loss], max_steps=12)
    losses, shares = logged(trainer, f"loss/{loss}"), logged(trainer, "aligned")
    assert losses[-1] < 0.8 * losses[0]
    assert all(0.2 < share < 1.0 for share in shares)
    figures = trainer.evaluate(rows.select(range(4)))
    assert 0.2 < figures["eval_aligned"] < 1.0
    assert figures["eval_loss"] == pytest.approx(figures[f"eval_loss/{loss}"], rel=1e-3)


def test_padding_packing_chunks_and_accumulation_change_nothing(foreign, train, teacher_of, logged, rows):
    teacher, few = teacher_of(foreign), rows.select(range(8))
    losses = ["reverse_kl", "universal_logit", {"name": "cross_entropy", "weight": 0.5}]
    common = {"dataset": few, "max_steps": 1, "learning_rate": 1e-3, "max_length": 200}
    runs = {
        "padded": {"per_device_train_batch_size": 8},
        "chunks": {"per_device_train_batch_size": 8, "loss_chunk_size": 3},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "packed": {"per_device_train_batch_size": 8, "packing": True},
        "flat": {"per_device_train_batch_size": 8, "padding_free": True, "max_length": None},
    }
    trained = {name: train(teacher, losses, **common | run) for name, run in runs.items()}
    for name, trainer in trained.items():
        for figure in ("loss", "grad_norm", "aligned", "teacher_kl"):
            expected = logged(trained["padded"], figure)
            assert logged(trainer, figure) == pytest.approx(expected, rel=1e-4), (name, figure)


def test_a_cut_completion_aligns_as_far_as_it_goes(foreign, train, teacher_of, logged, rows):
    """The first tokens are trained as in a run of whole rows, whose later positions do not reach back."""
    long = Dataset.from_list([{"prompt": "what :", "completion": " " + " ".join(rows["completion"][:6])}])
    cut = train(teacher_of(foreign), dataset=long, max_steps=1, max_length=40, per_device_train_batch_size=1)
    row = cut.train_dataset[0]
    own = [token for token in row["labels"] if token != -100]
    theirs = [token for token in row["teacher_labels"] if token != -100]
    text, prefix = (t.decode(ids) for t, ids in ((cut.processing_class, own), (foreign, theirs)))
    assert len(row["input_ids"]) == 40
    assert long[0]["completion"].strip().startswith(prefix.strip())
    assert 0 <= len(prefix.strip()) - len(text.strip()) < 12
    narrow = train(
        teacher_of(foreign), dataset=long, max_steps=1, max_teacher_length=20, per_device_train_batch_size=1
    ).train_dataset[0]
    assert len(narrow["teacher_input_ids"]) == 20
    assert len(narrow["input_ids"]) > 40
    assert 0.1 < logged(cut, "aligned")[0] < 1.0


def test_the_teacher_writes_completions_in_its_own_tokens(foreign, train, teacher_of, bare):
    trainer = train(
        teacher_of(foreign), dataset=bare.select(range(4)), max_new_tokens=9, teacher_prompt_template="Q: {input}"
    )
    teacher = trainer.teacher.model
    ids = foreign(f"Q: {bare['input'][0]}", return_tensors="pt")["input_ids"]
    written = teacher.generate(ids, max_new_tokens=9, do_sample=False)[0, ids.shape[1] :]
    text = foreign.decode(written, skip_special_tokens=True)
    rows = [[t for t in row["labels"] if t != -100] for row in trainer.train_dataset]
    assert text in [trainer.processing_class.decode(row, skip_special_tokens=True) for row in rows]


def test_each_side_has_its_own_chat_template(train, teacher_of, logged, wide_tokenizer, piece_tokenizer):
    turns = [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "the lazy dog ."}]
    student = type(piece_tokenizer).from_pretrained(teacher_of(piece_tokenizer))
    student.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )
    trainer = train(
        teacher_of(wide_tokenizer), dataset=Dataset.from_list([{"messages": turns}]), tokenizer=student, max_steps=1,
        teacher_prompt_template=[{"role": "system", "content": "be brief"}], per_device_train_batch_size=1,
    )  # fmt: skip
    row = trainer.train_dataset[0]
    assert wide_tokenizer.decode(row["teacher_input_ids"]) == (
        "system: be brief<turn>user: what ?<turn>assistant: the lazy dog .<turn>"
    )
    rows = trainer._alignment.rows(torch.tensor([row["labels"]]), torch.tensor([row["teacher_labels"]]))
    own = [token for token in row["labels"] if token != -100]
    end = own.index(student.eos_token_id)
    assert student.decode(own[end + 1 :]) == "\n"
    assert rows[0] == -1  # " the", and no token of the teacher's begins there
    assert rows[end] == len([token for token in row["teacher_labels"] if token != -100]) - 1
    assert rows[end + 1 :] == [-1] * len(rows[end + 1 :])


def test_losses_that_read_single_tokens_are_refused_in_one_line(wide_tokenizer, train, teacher_of):
    message = (
        "the loss logit_mse compares token by token, and the teacher .* has another tokenizer: .* of the student's"
    )
    with pytest.raises(TeacherError, match=message) as error:
        train(teacher_of(wide_tokenizer), ["forward_kl", "logit_mse"])
    assert "forward_kl or universal_logit" in str(error.value)
    with pytest.raises(TeacherError, match="the loss hidden_mse compares"):
        train(teacher_of(wide_tokenizer), ["hidden_mse"])


def test_cross_entropy_on_its_completions_needs_no_alignment(wide_tokenizer, train, teacher_of, logged, bare):
    trainer = train(teacher_of(wide_tokenizer), ["cross_entropy"], dataset=bare.select(range(4)), max_new_tokens=6)
    assert len(logged(trainer, "loss/cross_entropy")) == 3
    assert logged(trainer, "aligned") == []


def test_rows_that_are_tokenised_already_are_refused(wide_tokenizer, train, teacher_of):
    rows = Dataset.from_list([{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}])
    with pytest.raises(DataError, match="the rows are tokenised already"):
        train(teacher_of(wide_tokenizer), dataset=rows)


def test_views_of_different_rows_are_refused(wide_tokenizer, train, teacher_of):
    trainer = train(teacher_of(wide_tokenizer), max_steps=1)
    row = trainer.train_dataset[0]
    row["teacher_labels"] = [-100] * len(row["teacher_labels"])
    with pytest.raises(DataError, match=r"hold \[1\] and \[0\] completions in its rows"):
        trainer.data_collator([row])


@pytest.fixture
def make_on_policy(bare, quiet, tiny_causal_lm, tiny_tokenizer):
    def make(teacher, **config):
        return DistillGKDTrainer(
            model=tiny_causal_lm(0),
            teacher_model=teacher,
            args=DistillGKDConfig(**quiet | {"max_new_tokens": 8} | config),
            train_dataset=bare,
            processing_class=tiny_tokenizer,
        )

    return make


def test_what_the_student_writes_reaches_the_teacher_in_its_own_tokens(foreign, make_on_policy, teacher_of, logged):
    """Random models write any bytes; half a character is no text, and does not align."""
    trainer = make_on_policy(teacher_of(foreign), lmbda=1.0, losses=["reverse_kl"])
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    ended, open_end = ([*trainer.processing_class(" the fox")["input_ids"], *end] for end in ([1], []))
    cut_character = trainer.processing_class("é")["input_ids"][:1]
    written = [ended, open_end, cut_character, [1]]
    longest = max(map(len, written))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in written])
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in written])
    again = trainer._rewrite(batch, ids, mask)
    answers = [[t for t in row if t != -100] for row in again["teacher_labels"].tolist()]
    table = token_bytes(foreign)
    assert b"".join(table[token] for token in answers[1]) == b" the fox"
    assert answers[0] == [*answers[1], foreign.eos_token_id]
    assert answers[3] == [foreign.eos_token_id]
    rows = trainer._alignment.rows(again["labels"], again["teacher_labels"])
    starts = [0, len(ended), len(ended) + len(open_end), len(ended) + len(open_end) + 1]
    firsts = [0, len(answers[0]), -1, sum(map(len, answers[:3]))]
    assert [rows[start] for start in starts] == firsts
    trainer.train()
    assert all(0.0 < share <= 1.0 for share in logged(trainer, "aligned"))


def test_seq_kd_is_refused(wide_tokenizer, make_on_policy, teacher_of):
    with pytest.raises(ConfigError, match="with seq_kd the teacher writes in the student's tokens, and"):
        make_on_policy(teacher_of(wide_tokenizer), seq_kd=True)


def test_a_tokenizer_too_large_for_its_model_is_refused(train, tiny_causal_lm, wide_tokenizer, tmp_path):
    for part in (tiny_causal_lm(1, vocab=100), wide_tokenizer):
        part.save_pretrained(tmp_path / "small")
    with pytest.raises(TeacherError, match=f"has {len(wide_tokenizer)} tokens and its model only 100; resize"):
        train(str(tmp_path / "small"))


def test_padding_is_a_token_the_teacher_has(wide_tokenizer, train, teacher_of):
    trainer = train(teacher_of(wide_tokenizer), max_steps=1)
    trainer.data_collator.base.pad_token_id = 10_000  # as where the student's vocabulary is much larger
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    assert int(batch["input_ids"].max()) == 10_000
    assert int(batch["teacher_input_ids"].max()) < len(wide_tokenizer)
    kept = batch["teacher_attention_mask"].bool()
    rows = [trainer.train_dataset[i]["teacher_input_ids"] for i in range(4)]
    assert batch["teacher_input_ids"][kept].tolist() == [token for row in rows for token in row]


def test_a_teacher_that_only_writes_needs_no_alignment(train, teacher_of, bare):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[EOS]", *letters, *(f"##{letter}" for letter in letters)]
    pieces = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="[UNK]", eos_token="[EOS]", pad_token="[PAD]"
    )
    options = {"dataset": bare.select(range(4)), "max_new_tokens": 20, "max_length": 12}  # completions are cut
    trainer = train(teacher_of(tokenizer), ["cross_entropy"], **options)
    assert set(trainer.train_dataset.column_names) == {"input_ids", "labels"}
    with pytest.raises(ConfigError, match="neither a byte-level BPE nor sentencepiece's"):
        train(teacher_of(tokenizer), ["forward_kl"], **options)
