//! `warp_products!`: writes fragments, and the two products of a flash-attention step for one warp.
//!
//! (PTX ISA 9.7.14.5, mma.sync.m16n8k16 and ldmatrix.) Each takes a key tile to its end. Factors
//! from shared memory come four matrices of 8 x 8 at a time, and every block of 16 rows of the warp
//! multiplies with them. The products are arithmetic on registers, which compilers may move.

use framestride_shapes::blocks::holds_queries;
use framestride_shapes::fragment::row_of;
use framestride_shapes::image::{ATOM_BYTES, ATOM_ROWS, CHUNK_BYTES, Image};
use proc_macro2::{Ident, TokenStream};
use quote::{format_ident, quote};
use syn::{Error, Result, Visibility};

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
    let [_, weights, output] = types(&name);
    let products = products(&kernels, &visibility, &name, &element, key_rows, columns);
    let image = Image { head_dim, dtype };
    let products_of_blocks = blocks.iter().map(|&blocks| {
        let blocks = blocks as usize;
        let add_output = add_output(image, key_rows, columns, blocks);
        quote! {
            impl #kernels::cuda::mma::WarpProducts<#blocks> for #name {
                #[inline(always)]
                unsafe fn add_output(
                    output: &mut [#output; #blocks],
                    weights: &[#weights; #blocks],
                    v: #kernels::cuda::mma::Matrices,
                ) {
                    #(#add_output)*
                }
            }
        }
    });
    // Warps of attention have no outputs of one block.
    let traits_of_kernel = if blocks.contains(&1) {
        let both_products =
            blocks.iter().map(|&blocks| both_products(&kernels, &name, image, key_rows, columns, blocks as usize));
        let sample_products = sample_products(&kernels, &visibility, &name, image, key_rows);
        quote!(#sample_products #(#both_products)*)
    } else {
        blocks.iter().map(|&blocks| warp_scores(&kernels, &name, image, key_rows, blocks)).collect()
    };
    let product = |summand: &str| {
        format!(
            "mma.sync.aligned.m16n8k16.row.col.f32.{ptx}.{ptx}.f32 \
             {{{{{{0}}, {{1}}, {{2}}, {{3}}}}}}, {{{{{{4}}, {{5}}, {{6}}, {{7}}}}}}, {{{{{{8}}, {{9}}}}}}, {summand};",
            ptx = dtype.as_str()
        )
    };
    let (multiply, multiply_from) = (product("{{{0}, {1}, {2}, {3}}}"), product("{{{10}, {11}, {12}, {13}}}"));
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

            /// C + A B, of 16 rows by 8 columns.
            #[inline(always)]
            fn multiply_from(c: [f32; 4], a: [u32; 4], b: [u32; 2]) -> [f32; 4] {
                let (d0, d1, d2, d3): (f32, f32, f32, f32);
                // SAFETY: this is arithmetic on registers.
                unsafe {
                    ::core::arch::asm!(
                        #multiply_from,
                        out(reg32) d0, out(reg32) d1, out(reg32) d2, out(reg32) d3,
                        in(reg32) a[0], in(reg32) a[1], in(reg32) a[2], in(reg32) a[3],
                        in(reg32) b[0], in(reg32) b[1],
                        in(reg32) c[0], in(reg32) c[1], in(reg32) c[2], in(reg32) c[3],
                        options(pure, nomem, nostack)
                    );
                }
                [d0, d1, d2, d3]
            }
        }

        #(#products_of_blocks)*

        #traits_of_kernel
    })
}

/// `WarpScores`.
fn warp_scores(kernels: &TokenStream, name: &Ident, image: Image, key_rows: u32, blocks: u32) -> TokenStream {
    let [scores, ..] = types(name);
    let block_count = blocks as usize;
    let steps = image.head_dim / 16;
    let load = |step: u32, block: u32| load("q", image, 16 * block, 16 * step, false);
    let (queries, load_queries, add_scores) = if holds_queries(image.head_dim) {
        let loads = (0..steps).flat_map(|step| (0..blocks).map(move |block| load(step, block)));
        let count = (steps * blocks) as usize;
        let held = |step: u32, block: u32| {
            let index = (step * blocks + block) as usize;
            quote!(queries[#index])
        };
        (quote!([[u32; 4]; #count]), quote!([#(#loads),*]), add_scores(image, key_rows, blocks, held))
    } else {
        let add_scores = add_scores(image, key_rows, blocks, load);
        (quote!(#kernels::cuda::mma::Matrices), quote!(q), quote!(let q = queries.opaque(); #add_scores))
    };
    quote! {
        impl #kernels::cuda::mma::WarpScores<#block_count> for #name {
            type Queries = #queries;

            #[inline(always)]
            unsafe fn queries(q: #kernels::cuda::mma::Matrices) -> #queries {
                #load_queries
            }

            #[inline(always)]
            unsafe fn add_scores(
                scores: &mut [#scores; #block_count],
                queries: #queries,
                k: #kernels::cuda::mma::Matrices,
            ) {
                #add_scores
            }
        }
    }
}

/// `SampleProducts`.
fn sample_products(
    kernels: &TokenStream,
    visibility: &Visibility,
    name: &Ident,
    image: Image,
    key_rows: u32,
) -> TokenStream {
    let [scores, weights, _] = types(name);
    let queries_type = format_ident!("{name}Queries");
    let queries = fields("q", image.head_dim / 4);
    let load_queries = (0..image.head_dim / 16).map(|step| {
        let load = load("q", image, 0, 16 * step, false);
        let registers = &queries[4 * step as usize..][..4];
        quote!(let [#(#registers),*] = #load;)
    });
    let add_scores = sample_scores(image, key_rows);
    let registers = fields("a", key_rows / 4);
    let kept = (0..key_rows / 4).map(|index| {
        let (register, row, group) = (&registers[index as usize], row_of(2 * index), index / 2);
        // Two bytes of the first key's bit, and two of the second's.
        let (word, byte) = (group as usize / 4, group % 4);
        let (first, second) = (8 + byte, 8 + 4 + byte);
        let selector = first | first << 4 | second << 8 | second << 12;
        quote!(#register: weights.#register & #kernels::cuda::math::byte_signs::<#selector>(signs[#row][#word][0], signs[#row][#word][1]))
    });
    let quads: Vec<_> = registers.chunks(4).collect();
    let places: Vec<_> = (0..quads.len() as u32).map(|quad| quad * 32 * CHUNK_BYTES).collect();
    quote! {
        /// Query rows of one thread, two elements in a register.
        #[derive(Clone, Copy)]
        #visibility struct #queries_type { #(#queries: u32,)* }

        impl #kernels::cuda::mma::SampleProducts for #name {
            type Queries = #queries_type;

            #[inline(always)]
            unsafe fn queries(q: #kernels::cuda::mma::Matrices) -> #queries_type {
                #(#load_queries)*
                #queries_type { #(#queries,)* }
            }

            #[inline(always)]
            unsafe fn sample_scores(
                scores: &mut #scores,
                start: [f32; 2],
                queries: &#queries_type,
                k: #kernels::cuda::mma::Matrices,
            ) {
                let start = [start[0], start[0], start[1], start[1]];
                #(#add_scores)*
            }

            #[inline(always)]
            fn keep_seen(weights: &#weights, seen: [u64; 2], lane: u32) -> #weights {
                // Of each group of 8 keys, the bits of the thread's two become signs of a byte.
                let shift = 6 - #kernels::shapes::fragment::first_column(lane);
                let signs = seen.map(
                    #[inline(always)]
                    |seen| [seen as u32, (seen >> 32) as u32].map(|word| [word << (shift + 1), word << shift]),
                );
                #weights { #(#kept,)* }
            }

            #[inline(always)]
            unsafe fn store_weights(weights: &#weights, to: u32, lane: u32) {
                let to = to + lane * #CHUNK_BYTES;
                #(#kernels::cuda::shared::store16(to + #places, [#(weights.#quads),*]);)*
            }

            #[inline(always)]
            unsafe fn load_weights(from: u32, lane: u32) -> #weights {
                let from = from + lane * #CHUNK_BYTES;
                #(let [#(#quads),*] = #kernels::cuda::shared::load16(from + #places);)*
                #weights { #(#registers,)* }
            }
        }
    }
}

/// `BothProducts`.
fn both_products(
    kernels: &TokenStream,
    name: &Ident,
    image: Image,
    key_rows: u32,
    columns: u32,
    blocks: usize,
) -> TokenStream {
    let ([scores, weights, output], queries) = (types(name), format_ident!("{name}Queries"));
    let add_both = add_both(image, key_rows, columns, blocks);
    quote! {
        impl #kernels::cuda::mma::BothProducts<#blocks> for #name {
            #[inline(always)]
            unsafe fn add_both(
                output: &mut [#output; #blocks],
                weights: &[#weights; #blocks],
                v: #kernels::cuda::mma::Matrices,
                scores: &mut #scores,
                start: [f32; 2],
                queries: &#queries,
                k: #kernels::cuda::mma::Matrices,
            ) {
                let start = [start[0], start[0], start[1], start[1]];
                #add_both
            }
        }
    }
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

/// S += Q K^T, in head_dim / 16 steps. `queries` are those of a step, of a block.
fn add_scores(image: Image, key_rows: u32, blocks: u32, queries: impl Fn(u32, u32) -> TokenStream) -> TokenStream {
    let steps = (0..image.head_dim / 16).map(|step| {
        let queries = (0..blocks).map(|block| queries(step, block));
        let pairs = (0..key_rows / PAIR).map(|pair| {
            let keys = load("k", image, PAIR * pair, 16 * step, false);
            let multiply = (0..2).flat_map(|half| {
                let registers = group(2 * pair + half);
                let (low, high) = (2 * half as usize, 2 * half as usize + 1);
                (0..blocks as usize).map(move |block| {
                    quote! {
                        Self::multiply([#(&mut scores[#block].#registers),*], own[#block], [keys[#low], keys[#high]]);
                    }
                })
            });
            quote! {
                let keys = #keys;
                #(#multiply)*
            }
        });
        quote! {
            let own = [#(#queries),*];
            #(#pairs)*
        }
    });
    quote!(#(#steps)*)
}

/// O += P V, a piece for each load of values.
fn add_output(image: Image, key_rows: u32, columns: u32, blocks: usize) -> Vec<TokenStream> {
    let steps = (0..key_rows / 16).flat_map(|step| (0..columns / PAIR).map(move |pair| (step, pair)));
    let piece = |(step, pair)| {
        let factors = &fields("a", key_rows / 4)[4 * step as usize..][..4];
        let values = load("v", image, 16 * step, PAIR * pair, true);
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
    };
    steps.map(piece).collect()
}

/// S = C + Q K^T with queries in registers, a piece for each load of keys. `start` is C.
fn sample_scores(image: Image, key_rows: u32) -> Vec<TokenStream> {
    let queries = fields("q", image.head_dim / 4);
    let steps = (0..image.head_dim / 16).flat_map(|step| (0..key_rows / PAIR).map(move |pair| (step, pair)));
    let piece = |(step, pair)| {
        let keys = load("k", image, PAIR * pair, 16 * step, false);
        let registers = &queries[4 * step as usize..][..4];
        let multiply = (0..2u32).map(|half| {
            let group = group(2 * pair + half);
            let (low, high) = (2 * half as usize, 2 * half as usize + 1);
            if step == 0 {
                quote!([#(scores.#group),*] = Self::multiply_from(start, [#(queries.#registers),*], [keys[#low], keys[#high]]);)
            } else {
                quote!(Self::multiply([#(&mut scores.#group),*], [#(queries.#registers),*], [keys[#low], keys[#high]]);)
            }
        });
        quote! {
            let keys = #keys;
            #(#multiply)*
        }
    };
    steps.map(piece).collect()
}

/// Both, whose pieces take turns. Keys need a multiple of the loads of values, so several of theirs
/// come before each of values.
fn add_both(image: Image, key_rows: u32, columns: u32, blocks: usize) -> TokenStream {
    let (scores, output) = (sample_scores(image, key_rows), add_output(image, key_rows, columns, blocks));
    assert_eq!(scores.len() % output.len(), 0, "keys need a multiple of the loads of values");
    let pieces =
        scores.chunks(scores.len() / output.len()).zip(&output).map(|(scores, output)| quote!(#(#scores)* #output));
    quote!(#(#pieces)*)
}
