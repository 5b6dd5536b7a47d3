"""A node of ComfyUI that makes attention over video sparse, with framestride."""

from .attention import SparseAttention, watch


class FramestrideSparseAttention:
    DESCRIPTION = "Attention over video sees only a part of all pairs of rows. Early steps should stay dense."
    CATEGORY = "framestride"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls):
        def share(default, least, tooltip):
            return "FLOAT", {"default": default, "min": least, "max": 1.0, "step": 0.01, "tooltip": tooltip}

        return {
            "required": {
                "model": ("MODEL",),
                "density": share(0.25, 0.05, "Part of all pairs of rows that a head sees"),
                "start": share(0.2, 0.0, "Share of the sampling after which attention is sparse"),
                "end": share(1.0, 0.0, "Share of the sampling after which it is as it was again"),
            },
            "optional": {
                "compute": (
                    ["dtype", "e4m3"], {"tooltip": "e4m3: in 8 bits, for head dim 128 on a Hopper; else in 16, as the model is"}
                ),
            },
        }

    def apply(self, model, density, start, end, compute="dtype"):
        sampling = model.get_model_object("model_sampling")
        model = model.clone()
        options = dict(model.model_options.get("transformer_options", {}))
        options["optimized_attention_override"] = SparseAttention(
            density, sampling.percent_to_sigma(start), sampling.percent_to_sigma(end),
            compute, options.get("optimized_attention_override"),
        )
        model.model_options["transformer_options"] = options
        # This type of wrapper is around the forward of the diffusion model.
        model.add_wrapper_with_key("diffusion_model", "framestride", watch)
        return (model,)


NODE_CLASS_MAPPINGS = {"FramestrideSparseAttention": FramestrideSparseAttention}
NODE_DISPLAY_NAME_MAPPINGS = {"FramestrideSparseAttention": "framestride sparse attention"}
