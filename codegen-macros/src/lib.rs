//! Procedural macros for GPU kernels: what Rust cannot say.
//!
//! | macro | writes |
//! | --- | --- |
//! | [`kernel`] | an entry point, and its row of the launch table |
//! | [`tile_products!`] | register fragments of one named field a register, and the wgmma groups on them |
//! | [`attention_kernels!`] | a spec as constants, and the entries of its kernels |
//!
//! `framestride_kernels` hands them on, and puts its own path and a `;` before the input of the last two: what they write finds the
//! crate under whatever name its user has given it.
//!
//! Each is `parse -> valid -> expand` in a module of its own. They contain no arithmetic of the kernels (that is in `gpu-kernels`)
//! and no geometry (that is in `shapes`).

mod attention_kernels;
mod kernel;
mod tile_products;

use proc_macro::TokenStream;
use quote::ToTokens;
use syn::parse::ParseStream;

/// The path of `framestride_kernels` that stands before the input.
fn kernels_crate(input: ParseStream) -> syn::Result<proc_macro2::TokenStream> {
    let path = input.call(syn::Path::parse_mod_style)?;
    input.parse::<syn::Token![;]>()?;
    Ok(path.into_token_stream())
}

/// Makes a function the entry of a kernel.
///
/// ```ignore
/// #[kernel(threads = 256, min_blocks = 4, shared_bytes = 0)]
/// pub unsafe fn scale(data: u64, factor: f32, count: u32) { ... }
/// ```
///
/// `threads` of a block is required; `min_blocks` per multiprocessor (1) bounds the registers; `shared_bytes` (0) is the dynamic
/// shared memory. The builder reads the three from the launch table and writes them into the entry and the manifest. The
/// function must be `unsafe`, return nothing, and take arguments by value; it may use the whole of `framestride_kernels::cuda`.
#[proc_macro_attribute]
pub fn kernel(arguments: TokenStream, item: TokenStream) -> TokenStream {
    kernel::expand(arguments.into(), item.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Makes a type with the products of a flash-attention step on the tensor cores, and its register fragments.
///
/// ```ignore
/// tile_products! { pub struct Products; element = Bf16, key_rows = 176, head_dim = 128 }
/// ```
///
/// (`framestride_kernels::tile_products!` gives its own path first.) `Products` implements `framestride_kernels::cuda::mma::TileProducts`: S = Q Kᵀ of 64 queries by `key_rows` keys (a multiple of
/// 16 up to 256) and O += P V of `head_dim` (64 or 128) columns, or of `columns = 64` of them where that is given. `element` is
/// `Bf16` or `F16`.
#[proc_macro]
pub fn tile_products(input: TokenStream) -> TokenStream {
    tile_products::expand(input.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Writes the kernels of a spec: `pack`, `profile`, `select` and `attention`, compiled for its shape. Once in a crate.
///
/// ```ignore
/// attention_kernels!(spec = "shapes/my.toml");
/// ```
///
/// The path is relative to the crate's `Cargo.toml`. Or the shape is spelled out, with the keys of the TOML file; tables become
/// braces, and what has a default there has it here:
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

/// Folder of this package, as it lay when this was compiled: what a constant is in other crates.
#[proc_macro]
pub fn folder(_: TokenStream) -> TokenStream {
    proc_macro::TokenTree::from(proc_macro::Literal::string(env!("CARGO_MANIFEST_DIR"))).into()
}

#[cfg(test)]
mod tests {
    //! What the macros write, as a person reads it. Review changes with `cargo insta review`.

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

    /// The smallest tile: every line of a larger one is a longer version of one of these.
    #[test]
    fn tile_products() {
        let input = quote! { ::framestride_kernels; pub struct Products; element = Bf16, key_rows = 32, head_dim = 64 };
        insta::assert_snapshot!(pretty(crate::tile_products::expand(input)));
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
}
