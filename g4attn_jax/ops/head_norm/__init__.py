"""RMSNorm of many heads in one launch: the kernel and the formula that the QKV norm ops share.

It has no public function: `ops.qkv_rms_norm` and `ops.q_keqv_rms_norm` say which rows of which
buffer are heads of Q, K and V.
"""
