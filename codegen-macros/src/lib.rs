//! Procedural macros for GPU kernels: they write what Rust cannot say.
//!
//! | macro | writes |
//! | --- | --- |
//! | [`kernel`] | an entry point, and its row of the launch table |
//! | [`tile_products!`] | register fragments, with one named field for each register, and the groups of wgmma on them |
//! | [`warp_products!`] | the same with the products of one warp, `mma.sync` |
//! | [`attention_kernels!`] | a spec as constants, and the entries of its kernels |
//!
//! `framestride_kernels` hands them on. It puts its own path and a `;` before the input of the last
//! three. So the code that they write finds the crate under any name.
//!
//! Each macro has a module of its own, which parses, checks and expands. None has arithmetic of the
//! kernels, which is in `gpu-kernels`, or geometry, which is in `shapes`.

mod attention_kernels;
mod kernel;
mod tile_products;
mod warp_products;

use framestride_shapes::arch::{ARCH_VARIABLE, Arch};
use proc_macro::TokenStream;
use quote::ToTokens;
use syn::parse::ParseStream;

/// Reads the path of `framestride_kernels`, which stands before the input.
fn kernels_crate(input: ParseStream) -> syn::Result<proc_macro2::TokenStream> {
    let path = input.call(syn::Path::parse_mod_style)?;
    input.parse::<syn::Token![;]>()?;
    Ok(path.into_token_stream())
}

/// The family of GPUs that the crate is compiled for.
fn arch() -> Arch {
    std::env::var(ARCH_VARIABLE).ok().and_then(|name| Arch::named(&name)).unwrap_or_default()
}

/// Makes a function the entry of a kernel.
///
/// ```ignore
/// #[kernel(threads = 256, min_blocks = 4, shared_bytes = 0)]
/// pub unsafe fn scale(data: u64, factor: f32, count: u32) { ... }
/// ```
///
/// * `threads` of a block must be given.
/// * `min_blocks` on a multiprocessor (1 by default) bounds the registers.
/// * `shared_bytes` (0 by default) is the dynamic shared memory.
///
/// The builder reads the three from the launch table and writes them into the entry and the
/// manifest. The function must be `unsafe`, return nothing, and take arguments by value. It may use
/// all of `framestride_kernels::cuda`.
#[proc_macro_attribute]
pub fn kernel(arguments: TokenStream, item: TokenStream) -> TokenStream {
    kernel::expand(arguments.into(), item.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Makes a type with the products of a flash-attention step on the tensor cores, and its register
/// fragments.
///
/// ```ignore
/// tile_products! { pub struct Products; element = Bf16, key_rows = 176, head_dim = 128 }
/// ```
///
/// `Products` implements `framestride_kernels::cuda::mma::TileProducts`. The first product is S = Q
/// Kᵀ, of 64 queries by `key_rows` keys, a multiple of 16 up to 256. The second is O += P V, of
/// `head_dim` columns (64 or 128), or of `columns = 64` of them where that is given. `element` is
/// `Bf16` or `F16`. (`framestride_kernels::tile_products!` gives its own path first.)
#[proc_macro]
pub fn tile_products(input: TokenStream) -> TokenStream {
    tile_products::expand(input.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Makes a type with the products of a flash-attention step of one warp (`mma.sync`), and its
/// register fragments.
///
/// ```ignore
/// warp_products! { pub struct Products; element = Bf16, key_rows = 64, head_dim = 128, blocks = [2] }
/// ```
///
/// `Products` implements `framestride_kernels::cuda::mma::WarpProducts<B>` for each B of `blocks`:
/// that many blocks of 16 rows multiply with each factor that is loaded. With a B of 1 it has the
/// traits of **profile** too (`SampleProducts`, `BothProducts`), else that of **attention**
/// (`WarpScores`). The other keys are those of [`tile_products!`], and `columns` may be 32 too.
/// (`framestride_kernels::warp_products!` gives its own path first.)
#[proc_macro]
pub fn warp_products(input: TokenStream) -> TokenStream {
    warp_products::expand(input.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Writes the kernels of a spec: `pack`, `profile`, `select` and `attention`, compiled for its
/// model. A crate may use it once.
///
/// ```ignore
/// attention_kernels!(spec = "shapes/my.toml");
/// ```
///
/// With `template = { head_dim = 128, dtype = bf16, compute = dtype }` it writes the kernels of every spec with that
/// head dim and type. Their numbers are literals with names, which loading fills in
/// (`framestride_shapes::numbers`).
///
/// The path is relative to the crate's `Cargo.toml`. Or the spec is spelled out, with the keys of
/// the TOML file. Tables become braces, and defaults are those of the file:
///
/// ```ignore
/// attention_kernels!(
///     frames = 33, tokens_per_frame = 3600, text = last { tokens = 256 },
///     heads = 24, head_dim = 128, dtype = bf16,
///     qk_norm = rms { over = head, eps = 1e-6 }, rope = interleaved { text = false },
///     mask = spatial { half_width = 15616 }, mask = temporal { density = 0.25 }, sink_frames = 0,
/// );
/// ```
#[proc_macro]
pub fn attention_kernels(input: TokenStream) -> TokenStream {
    attention_kernels::expand(input.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Folder of this package, as it lay when this was compiled. Other crates have a constant for that,
/// which a crate of macros cannot export.
#[proc_macro]
pub fn folder(_: TokenStream) -> TokenStream {
    proc_macro::TokenTree::from(proc_macro::Literal::string(env!("CARGO_MANIFEST_DIR"))).into()
}

#[cfg(test)]
mod tests {
    //! These snapshots show what the macros write as a person reads it. Review changes with `cargo
    //! insta review`.

    use proc_macro2::TokenStream;
    use quote::quote;

    fn pretty(expansion: syn::Result<TokenStream>) -> String {
        let file = syn::parse2(expansion.expect("the input is valid")).expect("the expansion is items");
        prettyplease::unparse(&file)
    }

    #[test]
    fn kernel() {
        let item = quote! {
            /// data[i] *= factor
            pub unsafe fn scale(data: u64, factor: f32, count: u32) {
                body(data, factor, count)
            }
        };
        let bounds = quote!(threads = 256, min_blocks = 4, shared_bytes = 1024);
        insta::assert_snapshot!(pretty(crate::kernel::expand(bounds, item)));
    }

    /// This is the smallest tile. Every line of a larger one is a longer version of one of these.
    #[test]
    fn tile_products() {
        let input = quote! { ::framestride_kernels; pub struct Products; element = Bf16, key_rows = 32, head_dim = 64 };
        insta::assert_snapshot!(pretty(crate::tile_products::expand(input)));
    }

    /// The same in 8 bits, where only one head dim exists.
    #[test]
    fn tile_products_e4m3() {
        let input =
            quote! { ::framestride_kernels; pub struct Products; element = E4m3, key_rows = 32, head_dim = 128 };
        insta::assert_snapshot!(pretty(crate::tile_products::expand(input)));
    }

    /// This is the smallest tile, of one block and of two.
    #[test]
    fn warp_products() {
        let input = quote! {
            ::framestride_kernels; pub struct Products; element = F16, key_rows = 16, head_dim = 64, columns = 32,
            blocks = [1, 2]
        };
        insta::assert_snapshot!(pretty(crate::warp_products::expand(input)));
    }

    #[test]
    fn attention_kernels() {
        let input = quote! {
            ::framestride_kernels; name = "snapshot", frames = 5, tokens_per_frame = 23, text = first { tokens = 7 },
            heads = 3, head_dim = 128, dtype = f16,
            qk_norm = layer { over = heads, eps = 1e-5 }, rope = half { text = true },
            mask = spatial { half_width = 30 }, mask = temporal { density = 0.6 }, sink_frames = 1,
        };
        insta::assert_snapshot!(pretty(crate::attention_kernels::expand(input)));
    }

    /// Numbers of the spec are literals with names.
    #[test]
    fn template() {
        let input = quote! { ::framestride_kernels; template = { head_dim = 64, dtype = f16, compute = dtype } };
        insta::assert_snapshot!(pretty(crate::attention_kernels::expand(input)));
    }
}
