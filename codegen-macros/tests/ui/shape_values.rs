use framestride_macros::attention_kernels;

attention_kernels!(::framestride_kernels;
    frames = 0,
    tokens_per_frame = 3600,
    text = middle { tokens = 256 },
    heads = 24,
    head_dim = 96,
    dtype = bf16,
    mask = spatial { half_width = 15616, density = 0.25 },
    mask = temporal { width = 3 },
);

fn main() {}
