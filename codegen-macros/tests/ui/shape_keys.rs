use framestride_macros::attention_kernels;

attention_kernels!(::framestride_kernels; frames = 33, tokens_per_frame = 3600, causal = true);

fn main() {}
