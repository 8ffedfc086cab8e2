"""The model of gpt2_mla.py as transformers wants it: what dev/export_hf.py puts behind that file.

An exported folder has both in one file, which AutoModelForCausalLM.from_pretrained(FOLDER,
trust_remote_code=True) opens. It computes what gpt2_mla.py does. generate() keeps in
transformers' own cache what the C program keeps with --cache absorbed: of mla the latent and the
rotary key, of all others keys and values. Sequences are of one length: no padding.
"""

import torch
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from gpt2_mla import GPT, Config, rope_table  # in an exported file they stand above

# What transformers call a cache: `cache` of late, before `past_key_values`.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class MlaConfig(PretrainedConfig):
    """The fields of Config, under the same names; config.json holds all of them."""

    model_type = "train_gpt2_mla"
    keys_to_ignore_at_inference = [CACHE]
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer",
                     "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head",
                     "max_position_embeddings": "block_size"}

    def __init__(self, **kwargs):
        names = set(Config.__dataclass_fields__)
        given = {name: kwargs.pop(name) for name in names & kwargs.keys()}
        # transformers also makes one without arguments, to know what is left at its default
        config = Config(**({"kv_rank": 64, "rope_dim": 32} | given))
        for name in names:
            setattr(self, name, getattr(config, name))
        super().__init__(**kwargs)


class StepCache:
    """transformers' cache in the form that Attention and GPT expect, for one forward pass.

    Per layer it holds two tensors (B, n, S, width): of mla the latent and rotary key, (B, 1, S,
    R+RD), and nothing; of all others keys, with a rotary key that heads share written to each of
    them, and values.
    """

    def __init__(self, model, past, T):
        c = model.config
        self.mode = "absorbed" if c.attention == "mla" else "full"
        self.past, self.length = past, past.get_seq_length()
        self.layers = {block.attn: i for i, block in enumerate(model.h)}
        self.rope = rope_table(self.length + T, c.rope_dim, like=model.wte.weight)  # (2, S, RD)

    def append(self, layer, parts):
        """parts: tensors (B, n, T, width) of T more positions -> what is kept of all S"""
        if len(parts) == 3:
            k, v, k_rope = parts
            parts = torch.cat([k, k_rope.expand(-1, k.shape[1], -1, -1)], dim=-1), v
        if len(parts) == 1:
            latent, = parts                                                      # (B, 1, T, R+RD)
            return self.past.update(latent, latent[..., :0], self.layers[layer])[:1]
        return self.past.update(*parts, self.layers[layer])


class MlaForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MlaConfig
    base_model_prefix = "transformer"
    accepts_loss_kwargs = False  # the loss is a batch's own mean: Trainer divides by their number

    def __init__(self, config):
        super().__init__(config)
        self.transformer = GPT(Config(**{name: getattr(config, name)
                                         for name in Config.__dataclass_fields__}))
        self.post_init()

    def _init_weights(self, module):
        pass  # GPT has done it

    def get_input_embeddings(self):
        return self.transformer.wte

    def set_input_embeddings(self, new):
        self.transformer.wte = new

    def get_output_embeddings(self):
        return None  # tied: GPT reads wte

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
        """Of the text so far, (B, S), what the cache does not hold yet."""
        past = kwargs.get(CACHE)
        refused = ("position_ids", "output_attentions", "output_hidden_states")  # by forward
        seen = past.get_seq_length() if past is not None else 0
        return {"input_ids": input_ids[:, seen:], "attention_mask": attention_mask, CACHE: past,
                "use_cache": kwargs.get("use_cache", True), "logits_to_keep": 1,
                **{name: kwargs.get(name) for name in refused}}

    def forward(self, input_ids, attention_mask=None, labels=None, cache=None,
                past_key_values=None, use_cache=None, logits_to_keep=0, return_dict=None, **others):
        """input_ids (B, T), labels (B, T) or None -> the mean loss of the next tokens or None, and
        logits (B, T, V), or of the last logits_to_keep positions; with return_dict=False a tuple.

        Labels are the inputs once more, shifted here; -100 is left out. With use_cache a cache is
        made and returned; one that is given is continued, by one token. others: whatever callers
        name for every model, as None or False; a value that would change nothing is refused.
        """
        for name, value in others.items():
            if value is not None and value is not False:
                raise ValueError(f"{name} is given, but this model does not take it: expected None")
        past = cache if cache is not None else past_key_values
        if past is not None and not isinstance(past, DynamicCache):
            raise ValueError(f"the cache is a {type(past).__name__}, expected a DynamicCache")
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("attention_mask has zeros, but this model takes no padding: expected "
                             "sequences of one length")
        if past is None and use_cache:
            past = DynamicCache()
        T = input_ids.shape[1]
        seen = past.get_seq_length() if past is not None else 0
        if T == 0 or (seen and T > 1):
            raise ValueError(f"{T} tokens after {seen} in the cache, expected a whole prompt, then "
                             "one at a time")
        if self.config.position == "learned" and seen + T > self.config.block_size:
            raise ValueError(f"{seen + T} tokens, but this model has {self.config.block_size} "
                             "learned positions")
        step = StepCache(self.transformer, past, T) if past is not None else None
        x = self.transformer.hidden(input_ids, step)                             # (B, T, C)
        if logits_to_keep:
            x = x[:, -logits_to_keep:]
        logits = F.linear(x, self.transformer.wte.weight)                        # (B, ., V)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        out = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: past})
        return out.to_tuple() if return_dict is False else out
