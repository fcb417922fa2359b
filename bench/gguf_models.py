"""Random models of a shape as GGUF files, for llama.cpp: weights are made in their packed form."""

import numpy as np

BLOCK = {"Q4_0": 18, "Q4_1": 20}  # bytes of 32 weights: a scale, Q4_1's least value, 16 bytes of codes


def packed(kind, rows, columns, rng):
    """[rows, bytes] of random 4-bit weights, about uniform with a standard deviation of 1 / sqrt(columns)."""
    blocks = rng.integers(0, 256, (rows, columns // 32, BLOCK[kind]), np.uint8)
    step = np.float16(1 / (4.6 * columns**0.5))
    blocks[..., :2] = np.frombuffer(step.tobytes(), np.uint8)
    if kind == "Q4_1":
        blocks[..., 2:4] = np.frombuffer(np.float16(-7.5 * step).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def _writer(path, architecture, words, length, width, blocks):
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(length)
    writer.add_embedding_length(width)
    writer.add_block_count(blocks)
    writer.add_vocab_size(words)
    writer.add_tokenizer_model("no_vocab")
    writer.add_layer_norm_rms_eps(1e-5)
    return writer


def _finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_llama(path, kind, *, width, blocks, heads, kv_heads, neurons, words, length=2048):
    """A Llama whose matrices, embedding and head are all in `kind` ("Q4_0" or "Q4_1")."""
    import gguf

    rng = np.random.default_rng(0)
    writer = _writer(path, "llama", words, length, width, blocks)
    writer.add_feed_forward_length(neurons)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(width // heads)

    def add(name, rows, columns=width):
        kind_of = getattr(gguf.GGMLQuantizationType, kind)
        writer.add_tensor(f"{name}.weight", packed(kind, rows, columns, rng), raw_dtype=kind_of)

    def add_norm(name):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))

    add("token_embd", words)
    add("output", words)
    add_norm("output_norm")
    keys = width // heads * kv_heads
    for i in range(blocks):
        for name, rows in (("attn_q", width), ("attn_k", keys), ("attn_v", keys), ("attn_output", width),
                           ("ffn_gate", neurons), ("ffn_up", neurons)):  # fmt: skip
            add(f"blk.{i}.{name}", rows)
        add(f"blk.{i}.ffn_down", width, neurons)
        add_norm(f"blk.{i}.attn_norm")
        add_norm(f"blk.{i}.ffn_norm")
    _finish(writer)


def write_mamba(path, *, width, blocks, states, taps, words, length=2048):
    """A Mamba in float32, whose inner width is twice `width`."""
    rng = np.random.default_rng(0)
    inner, rank = 2 * width, -(-width // 16)
    writer = _writer(path, "mamba", words, length, width, blocks)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_ssm_conv_kernel(taps)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(states)
    writer.add_ssm_time_step_rank(rank)

    def add(name, *shape, suffix=".weight"):
        values = rng.standard_normal(shape, np.float32) / shape[-1] ** 0.5
        writer.add_tensor(f"{name}{suffix}", values.astype(np.float32))

    add("token_embd", words, width)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for i in range(blocks):
        block = f"blk.{i}"
        writer.add_tensor(f"{block}.attn_norm.weight", np.ones(width, np.float32))
        add(f"{block}.ssm_in", 2 * inner, width)
        add(f"{block}.ssm_conv1d", inner, taps)
        add(f"{block}.ssm_conv1d", inner, suffix=".bias")
        add(f"{block}.ssm_x", rank + 2 * states, inner)
        add(f"{block}.ssm_dt", inner, rank)
        writer.add_tensor(f"{block}.ssm_dt.bias", np.full(inner, -4, np.float32))
        writer.add_tensor(f"{block}.ssm_a", -np.tile(np.arange(1, states + 1, dtype=np.float32), (inner, 1)))
        writer.add_tensor(f"{block}.ssm_d", np.ones(inner, np.float32))
        add(f"{block}.ssm_out", width, inner)
    _finish(writer)
