"""Configuration of a GPT with mixture-of-experts layers that were trained with megatron_moe."""

from transformers import PretrainedConfig


class MegatronMoEConfig(PretrainedConfig):
    """experts_per_layer: experts of each layer, 1 where it is dense. residual: None, or how a layer adds up its experts and the dense
    MLP beside them: coefficient, sum. qk_norm: None, head or hidden."""

    model_type = "megatron_moe_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=257,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=256,
        max_position_embeddings=128,
        position_embedding_type="learned_absolute",
        rotary_base=10000.0,
        normalization="LayerNorm",
        norm_eps=1e-5,
        activation="gelu",
        use_bias=True,
        qkv_bias=False,
        qk_norm=None,
        experts_per_layer=(1, 1),
        num_experts_per_tok=1,
        moe_intermediate_size=256,
        residual=None,
        shared_expert_intermediate_size=None,
        shared_expert_gate=False,
        latent_size=None,
        score_function="softmax",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
        n_group=None,
        topk_group=None,
        group_best=None,
        expert_bias=False,
        initializer_range=0.02,
        use_cache=True,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.position_embedding_type = position_embedding_type
        self.rotary_base = rotary_base
        self.normalization = normalization
        self.norm_eps = norm_eps
        self.activation = activation
        self.use_bias = use_bias
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.experts_per_layer = list(experts_per_layer)
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size
        self.residual = residual
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.shared_expert_gate = shared_expert_gate
        self.latent_size = latent_size
        self.score_function = score_function
        self.norm_topk_prob = norm_topk_prob
        self.routed_scaling_factor = routed_scaling_factor
        self.n_group = n_group
        self.topk_group = topk_group
        self.group_best = group_best
        self.expert_bias = expert_bias
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
