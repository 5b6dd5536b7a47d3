use framestride_macros::attention_kernels;

attention_kernels!(::framestride_kernels; spec = "no/such/spec.toml");

fn main() {}
