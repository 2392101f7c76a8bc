"""How the public ops are computed; private. A call goes through these files from top to bottom:

call.py                   the arguments of one call: checked, cast as autocast asks, rows flattened, plan chosen
  checks.py               every argument, once
  plan.py                 which plan, and why
  sizes.py                rows of a chunk and of the staging buffer, and their memory
  spec.py                 what is no tensor, as one record that goes through a custom op as text
custom_ops.py             what autograd and torch.compile see: each op with its shapes and gradient
driver.py                 chunks, buffers, order; the back end computes the rows
  topk.py                 the same for a teacher of which K tokens' log-probs are known
  policy.py               the clipped surrogate of a policy-gradient loss
  credit.py               cost-to-go and baselines on packed sequences, in reverse time
gradients.py              chunks of logit gradients -> dh, dW, db
  gemm.py                 the three products of a head, float32 out of any precision
  gradient_threshold.py   two of these products with the large entries of the gradient alone
  allocation.py           large blocks of memory
scaled_gradients.py       gradients formed in the forward pass, scaled in the backward pass
kept_gradient.py          logit gradients that are stored until their upstream gradient is known
"""
