//! `warp_products!`: writes fragments, and the two products of a flash-attention step for one warp.
//!
//! (PTX ISA 9.7.14.5, mma.sync.m16n8k16 and ldmatrix.) Each takes a key tile to its end. Factors
//! from shared memory come four matrices of 8 x 8 at a time, and every block of 16 rows of the warp
//! multiplies with them. The products are arithmetic on registers, which compilers may move.

use framestride_shapes::image::{ATOM_BYTES, ATOM_ROWS, CHUNK_BYTES, Image};
use proc_macro2::{Ident, TokenStream};
use quote::quote;
use syn::{Error, Result};

use crate::tile_products::{Element, Input, fields, products, types};

/// Columns of a matrix, rows of a matrix, and k of a product in those.
const MATRIX: u32 = 8;
/// Keys or columns of four matrices, two of which lie beside each other.
const PAIR: u32 = 2 * MATRIX;

pub fn expand(input: TokenStream) -> Result<TokenStream> {
    let Input { kernels, visibility, name, element, key_rows, head_dim, columns, blocks } = syn::parse2(input)?;
    let Element::Dtype(dtype, element) = element else {
        return Err(Error::new(
            name.span(),
            "products of single warps exist in 16 bits alone: element must be Bf16 or F16",
        ));
    };
    let [scores, weights, output] = types(&name);
    let products = products(&kernels, &visibility, &name, &element, key_rows, columns);
    let image = Image { head_dim, dtype };
    let products_of_blocks = blocks.into_iter().map(|blocks| {
        let blocks = blocks as usize;
        let add_scores = add_scores(image, key_rows, blocks);
        let add_output = add_output(image, key_rows, columns, blocks);
        quote! {
            impl #kernels::cuda::mma::WarpProducts<#blocks> for #name {
                #[inline(always)]
                unsafe fn add_scores(
                    scores: &mut [#scores; #blocks],
                    q: #kernels::cuda::mma::Matrices,
                    k: #kernels::cuda::mma::Matrices,
                ) {
                    #add_scores
                }

                #[inline(always)]
                unsafe fn add_output(
                    output: &mut [#output; #blocks],
                    weights: &[#weights; #blocks],
                    v: #kernels::cuda::mma::Matrices,
                ) {
                    #add_output
                }
            }
        }
    });
    let multiply = format!(
        "mma.sync.aligned.m16n8k16.row.col.f32.{ptx}.{ptx}.f32 \
         {{{{{{0}}, {{1}}, {{2}}, {{3}}}}}}, {{{{{{4}}, {{5}}, {{6}}, {{7}}}}}}, {{{{{{8}}, {{9}}}}}}, {{{{{{0}}, {{1}}, {{2}}, {{3}}}}}};",
        ptx = dtype.as_str()
    );
    Ok(quote! {
        #products

        impl #name {
            /// D += A B, of 16 rows by 8 columns.
            #[inline(always)]
            fn multiply(d: [&mut f32; 4], a: [u32; 4], b: [u32; 2]) {
                let [d0, d1, d2, d3] = d;
                // SAFETY: this is arithmetic on registers.
                unsafe {
                    ::core::arch::asm!(
                        #multiply,
                        inout(reg32) *d0, inout(reg32) *d1, inout(reg32) *d2, inout(reg32) *d3,
                        in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3],
                        in(reg32) b[0], in(reg32) b[1],
                        options(pure, nomem, nostack)
                    );
                }
            }
        }

        #(#products_of_blocks)*
    })
}

/// Loads four matrices of an operand: those at row `row` of the tile, a multiple of 16, and at
/// element `column` of the row, likewise.
///
/// In an atom, two chunks further on is an XOR of the address, since no other bit of a lane's
/// address depends on the chunk.
fn load(operand: &str, image: Image, row: u32, column: u32, transposed: bool) -> TokenStream {
    let chunk = column / image.chunk_elements();
    let atom = image.chunk(row, chunk) / ATOM_BYTES * ATOM_BYTES;
    let within = image.chunk(0, chunk) % ATOM_BYTES;
    debug_assert!(row.is_multiple_of(ATOM_ROWS) && within.is_multiple_of(2 * CHUNK_BYTES));
    let operand = Ident::new(operand, proc_macro2::Span::call_site());
    let load = if transposed { quote!(load_transposed) } else { quote!(load) };
    quote!(#operand.#load::<#atom, #within>())
}

/// The four values that a group of 8 columns has in a fragment.
fn group(group: u32) -> [Ident; 4] {
    let registers = fields("r", 4 * group + 4);
    [0, 1, 2, 3].map(|index| registers[(4 * group) as usize + index].clone())
}

/// S += Q K^T, in head_dim / 16 steps.
fn add_scores(image: Image, key_rows: u32, blocks: usize) -> TokenStream {
    let steps = (0..image.head_dim / 16).map(|step| {
        let queries = (0..blocks as u32).map(|block| load("q", image, 16 * block, 16 * step, false));
        let pairs = (0..key_rows / PAIR).map(|pair| {
            let keys = load("k", image, PAIR * pair, 16 * step, false);
            let multiply = (0..2).flat_map(|half| {
                let registers = group(2 * pair + half);
                let (low, high) = (2 * half as usize, 2 * half as usize + 1);
                (0..blocks).map(move |block| {
                    quote! {
                        Self::multiply([#(&mut scores[#block].#registers),*], queries[#block], [keys[#low], keys[#high]]);
                    }
                })
            });
            quote! {
                let keys = #keys;
                #(#multiply)*
            }
        });
        quote! {
            let queries = [#(#queries),*];
            #(#pairs)*
        }
    });
    quote!(#(#steps)*)
}

/// O += P V, in key_rows / 16 steps.
fn add_output(image: Image, key_rows: u32, columns: u32, blocks: usize) -> TokenStream {
    let steps = (0..key_rows / 16).map(|step| {
        let factors = fields("a", key_rows / 4)[4 * step as usize..][..4].to_vec();
        let pairs = (0..columns / PAIR).map(|pair| {
            let values = load("v", image, 16 * step, PAIR * pair, true);
            let factors = &factors;
            let multiply = (0..2).flat_map(|half| {
                let registers = group(2 * pair + half);
                let (low, high) = (2 * half as usize, 2 * half as usize + 1);
                (0..blocks).map(move |block| {
                    quote! {
                        Self::multiply(
                            [#(&mut output[#block].#registers),*],
                            [#(weights[#block].#factors),*],
                            [values[#low], values[#high]],
                        );
                    }
                })
            });
            quote! {
                let values = #values;
                #(#multiply)*
            }
        });
        quote!(#(#pairs)*)
    });
    quote!(#(#steps)*)
}
