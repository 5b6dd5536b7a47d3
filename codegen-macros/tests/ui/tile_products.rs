use framestride_macros::tile_products;

tile_products! { ::framestride_kernels; pub struct Odd; element = Bf16, key_rows = 100, head_dim = 64 }
tile_products! { ::framestride_kernels; pub struct Wide; element = Bf16, key_rows = 128, head_dim = 96 }
tile_products! { ::framestride_kernels; pub struct Float; element = F32, key_rows = 128, head_dim = 64 }
tile_products! { ::framestride_kernels; pub struct Missing; element = F16, head_dim = 64 }
tile_products! { ::framestride_kernels; pub struct Extra; element = F16, key_rows = 128, head_dim = 64, stages = 2 }

fn main() {}
