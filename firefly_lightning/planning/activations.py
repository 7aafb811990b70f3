"""Bytes that the forward pass of a micro-batch leaves for the backward pass; dropout is off, as in Bloom's own."""

from firefly_lightning.model.attention import bias_side
from firefly_lightning.model.loss import SUMMED_ROWS, chunk_size, group_size
from firefly_lightning.planning.runs import Run


def block_activations(run: Run, tokens: int, attended: int, spares: bool = True) -> float:
    """Bytes that one block keeps from its forward pass to compute its gradient, without weights.

    With a width of h, a token leaves these numbers. In the type of the residual stream: the inputs of both norms, 2 h.
    In the type of products: queries, keys and values, the output of attention and the input of GELU, (3 + 1 + 4) h.
    Together these are 40 h bytes in float32. The outputs of the norms, 2 h more, are computed again where norms are
    whole on the device. Mean and deviation of the two norms and a normaliser of each head come on top.

    Args:
        run: The run, which gives sizes and types.
        tokens: Tokens that norms and products see.
        attended: Tokens that attention sees.
        spares: Whether the block leaves out what is quickly computed again: outputs of norms, GELU's output, the output
            of attention in packed rows, and the float32 copies that attention makes on a CPU. A recomputed block leaves
            out nothing.
    """
    model = run.model
    residual = run.weight_bytes
    computed = run.computed_bytes
    scored = 4 if run.device == "cpu" else computed
    shared = run.layer_shares
    hidden = model.hidden_size
    norms = 2 * hidden * (residual + normed_bytes(run, spares)) + 4 * residual
    wide = (4 if spares else 1 + 4 + 4) * hidden * computed / shared
    attention = (3 * (computed if spares else scored) + scored) * hidden / shared + 4 * model.n_head / shared
    return tokens * (norms + wide) + attended * attention


def normed_bytes(run: Run, spares: bool = True) -> int:
    """Bytes kept of each number that a layer norm puts out."""
    return 0 if spares and run.entry.whole_weights else run.computed_bytes


def activations(run: Run) -> float:
    """Bytes that the model keeps from the forward pass for the backward pass, without logits.

    After its attention, the last block computes only the learned tokens. Checkpointing keeps the input of each block.
    Behind a frozen embedding nothing is kept of it; the few numbers between LoRA's two matrices are not counted.
    """
    model, load = run.model, run.load
    hidden, residual = model.hidden_size, run.weight_bytes
    bias = model.n_head * bias_side(load.longest) ** 2 * (4 if run.device == "cpu" else run.computed_bytes)
    ends = (0 if run.frozen else load.tokens * hidden * residual) + 2 * load.targets * hidden * residual + bias
    if run.checkpointing:
        return ends + model.n_layer * load.tokens * hidden * residual
    whole = (model.n_layer - 1) * block_activations(run, load.tokens, run.attended)
    # In the last block all tokens go as far as attention, and its outputs at the targets are picked and kept.
    shared = run.layer_shares
    before = (load.tokens - load.targets) * hidden * (residual + normed_bytes(run))
    attention = block_activations(run, 0, run.attended)
    picked = load.targets * hidden * run.computed_bytes / shared
    return ends + whole + before + attention + picked + block_activations(run, load.targets, 0)


def autocast_copies(run: Run) -> float:
    """Bytes of the 16-bit copies of the blocks' matrices that autocast keeps until the forward pass ends.

    It keeps them whether activations are recomputed or not; frozen ones are kept in 16 bits themselves.
    """
    if not run.mixed or run.entry.engine.keeps_masters or run.frozen:
        return 0.0
    shared = run.layer_shares
    return 2.0 * run.model.matrices * run.model.n_layer / shared


def fused_logits(run: Run) -> float:
    """Bytes that the loss in chunks takes at its most.

    They are logits and their logarithms, or the products that make the head's gradient, beside the gradients of the
    logits of some chunks. The head's gradient is summed in float32 and converted to the weight's type at the end; a
    frozen head has none. Autocast keeps a 16-bit copy of the head.
    """
    model, targets = run.model, run.load.targets
    chunk = chunk_size(model.vocab_size, run.device)
    logits = model.vocab_size * min(chunk, targets)
    together = min(group_size(model.vocab_size, run.device, int(run.computed_bytes)), targets)
    grouped = model.vocab_size * together * run.computed_bytes if together > chunk else 0
    hidden = 2.0 * targets * model.hidden_size * run.computed_bytes + grouped
    copied = 2 * model.embedding if run.computed_bytes < run.weight_bytes else 0
    if run.frozen:
        return hidden + copied + 8 * logits
    gradient = 4 * model.embedding
    if run.computed_bytes == 4:
        return hidden + gradient + 8 * logits
    products = 2 * logits * (not grouped) + 6 * min(SUMMED_ROWS, model.vocab_size) * model.hidden_size
    converted = 2 * model.embedding if run.weight_bytes == 2 else 0
    return hidden + copied + gradient + max(8 * logits, products, converted)


def plain_logits(run: Run) -> float:
    """Bytes of a loss over all logits in float32: their logarithms, and two gradients as the backward pass begins."""
    return 12.0 * run.model.vocab_size * run.load.targets


def working_set(run: Run) -> float:
    """Bytes that the backward pass of a block takes beyond those kept for it: gradients of its widest tensors.

    Of a quantised matrix there is a whole copy while a product with it is computed.
    """
    model, shared = run.model, run.layer_shares
    recomputed = block_activations(run, run.load.tokens, run.attended, spares=False) if run.checkpointing else 0.0
    whole = dequantized(run)
    return recomputed + whole + run.load.tokens * model.hidden_size * (8 / shared + 2) * run.computed_bytes


def dequantized(run: Run) -> float:
    """Bytes of the largest matrix of a block as a product needs it, where it is kept quantised."""
    return 4.0 * run.model.hidden_size**2 * run.computed_bytes if run.trained.quantize else 0.0
