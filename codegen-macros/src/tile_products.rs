//! `tile_products!`: writes fragments, and the two groups of wgmma of a flash-attention step.
//!
//! (PTX ISA 9.7.15.5, wgmma.mma_async.) Each group is one `asm!` block (fence, k-steps whose
//! descriptors advance inside it, commit), so that nothing can come between. A wait names the
//! registers that it releases, so that no use of them can rise above it.

use framestride_shapes::dtype::Dtype;
use framestride_shapes::fragment::row_of;
use framestride_shapes::image::{Image, e4m3};
use proc_macro2::{Ident, Span, TokenStream};
use quote::{format_ident, quote};
use syn::parse::{Parse, ParseStream};
use syn::{Error, LitInt, Result, Token, Visibility, bracketed};

/// What both macros of products are given.
pub struct Input {
    /// Path of `framestride_kernels`.
    pub kernels: TokenStream,
    pub visibility: Visibility,
    pub name: Ident,
    pub element: Element,
    pub key_rows: u32,
    pub head_dim: u32,
    /// Columns of V that the second product takes.
    pub columns: u32,
    /// Numbers of blocks of 16 rows that multiply with each factor that a warp loads. Products of a
    /// warpgroup have none.
    pub blocks: Vec<u32>,
}

/// What is multiplied.
pub enum Element {
    /// 16-bit elements, and their Rust name.
    Dtype(Dtype, Ident),
    /// Elements of 8 bits.
    E4m3,
}

impl Parse for Input {
    fn parse(input: ParseStream) -> Result<Input> {
        let kernels = crate::kernels_crate(input)?;
        let visibility: Visibility = input.parse()?;
        input.parse::<Token![struct]>()?;
        let name: Ident = input.parse()?;
        input.parse::<Token![;]>()?;
        let (mut element, mut key_rows, mut head_dim, mut columns, mut blocks) = (None, None, None, None, Vec::new());
        while !input.is_empty() {
            let key: Ident = input.parse()?;
            input.parse::<Token![=]>()?;
            match key.to_string().as_str() {
                "element" => {
                    let value: Ident = input.parse()?;
                    element = Some(match value.to_string().as_str() {
                        "Bf16" => Element::Dtype(Dtype::Bf16, value),
                        "F16" => Element::Dtype(Dtype::F16, value),
                        "E4m3" => Element::E4m3,
                        _ => return Err(Error::new(value.span(), "element must be Bf16, F16 or E4m3")),
                    });
                }
                "key_rows" => {
                    key_rows = Some(number(input, "key_rows must be a multiple of 16 from 16 to 256", |n| {
                        n % 16 == 0 && (16..=256).contains(&n)
                    })?)
                }
                "head_dim" => head_dim = Some(number(input, "head_dim must be 64 or 128", |n| n == 64 || n == 128)?),
                "columns" => {
                    columns = Some(number(input, "columns must be 32, 64 or 128", |n| [32, 64, 128].contains(&n))?)
                }
                "blocks" => {
                    let list;
                    bracketed!(list in input);
                    while !list.is_empty() {
                        blocks.push(number(&list, "blocks must be 1 to 4", |n| (1..=4).contains(&n))?);
                        list.parse::<Option<Token![,]>>()?;
                    }
                }
                _ => {
                    return Err(Error::new(
                        key.span(),
                        "unknown key; allowed: element, key_rows, head_dim, columns, blocks",
                    ));
                }
            }
            if !input.is_empty() {
                input.parse::<Token![,]>()?;
            }
        }
        let missing = |key: &str| Error::new(name.span(), format!("`{key}` is missing"));
        let head_dim = head_dim.ok_or_else(|| missing("head_dim"))?;
        let columns = columns.unwrap_or(head_dim);
        if matches!(element, Some(Element::E4m3))
            && (head_dim != 128 || columns != 128 || key_rows.is_some_and(|rows| rows % 32 != 0))
        {
            let rule = "E4m3 needs head_dim = 128 with all columns, and key_rows a multiple of 32";
            return Err(Error::new(name.span(), rule));
        }
        if columns > head_dim {
            return Err(Error::new(name.span(), format!("columns = {columns} is more than head_dim = {head_dim}")));
        }
        Ok(Input {
            kernels,
            element: element.ok_or_else(|| missing("element"))?,
            key_rows: key_rows.ok_or_else(|| missing("key_rows"))?,
            head_dim,
            columns,
            blocks,
            visibility,
            name,
        })
    }
}

fn number(input: ParseStream, rule: &str, allowed: impl Fn(u32) -> bool) -> Result<u32> {
    let literal: LitInt = input.parse()?;
    let value = literal.base10_parse()?;
    if allowed(value) { Ok(value) } else { Err(Error::new(literal.span(), rule)) }
}

pub fn expand(input: TokenStream) -> Result<TokenStream> {
    let Input { kernels, visibility, name, element, key_rows, head_dim, columns, blocks } = syn::parse2(input)?;
    if !blocks.is_empty() {
        return Err(Error::new(name.span(), "a warpgroup has no blocks: leave them out, or write `warp_products!`"));
    }
    let [scores, weights, output] = types(&name);
    let (products, weight_count, start_scores, start_output) = match &element {
        Element::Dtype(dtype, element) => {
            let image = Image { head_dim, dtype: *dtype };
            let offset = |step: u32| image.chunk(0, step * 16 / image.chunk_elements()) / 16;
            (
                products(&kernels, &visibility, &name, element, key_rows, columns),
                key_rows / 4,
                start_scores(dtype.as_str(), 16, head_dim, key_rows, offset),
                start_output(image, key_rows, columns),
            )
        }
        Element::E4m3 => (
            products_e4m3(&kernels, &visibility, &name, key_rows),
            key_rows / 8,
            start_scores("e4m3", 32, head_dim, key_rows, |step| e4m3::chunk(0, 2 * step) / 16),
            start_output_e4m3(key_rows),
        ),
    };
    let wait_scores = wait(quote!(PENDING), &[("scores", fields("r", key_rows / 2))]);
    let none = quote!(0);
    let wait_output = wait(none, &[("output", fields("r", columns / 2)), ("weights", fields("a", weight_count))]);
    Ok(quote! {
        #products

        impl #kernels::cuda::mma::TileProducts for #name {
            #[inline(always)]
            unsafe fn start_scores(
                scores: &mut #scores,
                q: #kernels::cuda::mma::Descriptor,
                k: #kernels::cuda::mma::Descriptor,
            ) {
                #start_scores
            }

            #[inline(always)]
            unsafe fn wait_scores<const PENDING: u32>(scores: &mut #scores) {
                #wait_scores
            }

            #[inline(always)]
            unsafe fn start_output(output: &mut #output, weights: &#weights, v: #kernels::cuda::mma::Descriptor) {
                #start_output
            }

            #[inline(always)]
            unsafe fn wait_output(output: &mut #output, weights: &mut #weights) {
                #wait_output
            }
        }
    })
}

/// The type of the products of 16-bit elements, the registers that they work on, and its `Products`.
pub fn products(
    kernels: &TokenStream,
    visibility: &Visibility,
    name: &Ident,
    element: &Ident,
    key_rows: u32,
    columns: u32,
) -> TokenStream {
    // A register holds two values of one row.
    let values = fields("r", key_rows / 2);
    let weights = values.chunks(2).map(|pair| {
        let (low, high) = (&pair[0], &pair[1]);
        quote!(<#kernels::element::#element as #kernels::element::Element>::pack(scores.#low, scores.#high))
    });
    let rows = (0..key_rows / 4).map(|index| row_of(2 * index));
    registers(kernels, visibility, name, [key_rows, columns], weights.zip(rows).collect())
}

/// The same for 8-bit elements and head dim 128, and its `ByteWeights`.
fn products_e4m3(kernels: &TokenStream, visibility: &Visibility, name: &Ident, key_rows: u32) -> TokenStream {
    // A register holds four values of one row: two of one group of 8 columns, and two of the next.
    // The image of V has its keys in the same order.
    let values = |index: u32| {
        let first = index / 2 * 8 + index % 2 * 2;
        [first, first + 1, first + 4, first + 5]
    };
    let register = |value: u32| format_ident!("r{value}");
    let count = key_rows / 8;
    let rounded = (0..count).map(|index| {
        let values = values(index).map(register);
        (quote!(#kernels::element::pack_e4m3([#(scores.#values),*])), row_of(2 * index))
    });
    let products = registers(kernels, visibility, name, [key_rows, 128], rounded.collect());
    let [scores, weights, _] = types(name);
    let fields = fields("a", count);
    let weighed = (0..count).map(|index| {
        let (indices, values) = (values(index), values(index).map(register));
        quote!(#kernels::element::pack_e4m3([#(weight(#indices, scores.#values)),*]))
    });
    quote! {
        #products

        impl #kernels::cuda::mma::ByteWeights for #name {
            #[inline(always)]
            fn weigh(scores: &#scores, mut weight: impl FnMut(u32, f32) -> f32) -> #weights {
                #weights { #(#fields: #weighed,)* }
            }
        }
    }
}

/// The type of products on tiles of so many keys and columns, the registers that they work on, and
/// its `Products`. `rounded` has each register of the A operand: how it is made of scores, and which of
/// the thread's two rows it holds.
fn registers(
    kernels: &TokenStream,
    visibility: &Visibility,
    name: &Ident,
    [key_rows, columns]: [u32; 2],
    rounded: Vec<(TokenStream, usize)>,
) -> TokenStream {
    let [scores, weights, output] = types(name);
    let scores_fragment = fragment(kernels, visibility, &scores, key_rows / 2);
    let output_fragment = fragment(kernels, visibility, &output, columns / 2);
    let fields = fields("a", rounded.len() as u32);
    let (rounded, rows): (Vec<TokenStream>, Vec<usize>) = rounded.into_iter().unzip();
    quote! {
        #scores_fragment
        #output_fragment

        /// Weights of one thread, several in a register: the A operand of the second product.
        #[derive(Clone, Copy)]
        #visibility struct #weights { #(#fields: u32,)* }

        /// Products on one key tile.
        #visibility struct #name;

        impl #kernels::cuda::mma::Products for #name {
            type Scores = #scores;
            type Weights = #weights;
            type Output = #output;

            #[inline(always)]
            fn weights(scores: &#scores) -> #weights {
                #weights { #(#fields: #rounded,)* }
            }

            #[inline(always)]
            fn and_rows(weights: &#weights, rows: [u32; 2]) -> #weights {
                #weights { #(#fields: weights.#fields & rows[#rows],)* }
            }
        }
    }
}

/// Names of the registers of products: scores, weights, output.
pub fn types(name: &Ident) -> [Ident; 3] {
    ["Scores", "Weights", "Output"].map(|part| format_ident!("{name}{part}"))
}

/// Names of fields, one for each register.
pub fn fields(prefix: &str, count: u32) -> Vec<Ident> {
    (0..count).map(|index| Ident::new(&format!("{prefix}{index}"), Span::call_site())).collect()
}

/// A struct with an f32 field for each register, and unrolled visits of them.
fn fragment(kernels: &TokenStream, visibility: &Visibility, name: &Ident, count: u32) -> TokenStream {
    let registers = fields("r", count);
    let (index, same_index) = (0..count, 0..count);
    let group = 0..count / 4;
    let grouped = registers.chunks(4).map(|group| quote! { [#(&mut self.#group),*] });
    quote! {
        /// Registers of one thread in an accumulator.
        #[derive(Clone, Copy)]
        #visibility struct #name { #(#registers: f32,)* }

        impl #kernels::cuda::mma::Fragment for #name {
            #[inline(always)]
            fn splat(value: f32) -> Self {
                #name { #(#registers: value,)* }
            }

            #[inline(always)]
            fn for_each(&mut self, mut f: impl FnMut(u32, &mut f32)) {
                #(f(#index, &mut self.#registers);)*
            }

            #[inline(always)]
            fn for_each_with(&mut self, other: &Self, mut f: impl FnMut(u32, &mut f32, f32)) {
                #(f(#same_index, &mut self.#registers, other.#registers);)*
            }

            #[inline(always)]
            fn for_each_group(&mut self, mut f: impl FnMut(u32, [&mut f32; 4])) {
                #(f(#group, #grouped);)*
            }
        }
    }
}

/// A wait that names the registers that it releases. They are operands in a comment, which costs
/// nothing and orders every use of them.
fn wait(pending: TokenStream, released: &[(&str, Vec<Ident>)]) -> TokenStream {
    let count: usize = released.iter().map(|(_, registers)| registers.len()).sum();
    let mentions: Vec<String> = (0..count).map(|index| format!("{{{index}}}")).collect();
    let template = format!("wgmma.wait_group.sync.aligned {{{count}}}; // {}", mentions.join(" "));
    let operands = released.iter().map(|(owner, registers)| {
        let owner = Ident::new(owner, Span::call_site());
        quote! { #(inout(reg32) #owner.#registers,)* }
    });
    quote! { ::core::arch::asm!(#template, #(#operands)* const #pending, options(nostack)); }
}

/// `{0}, {1}, ...` in PTX braces.
fn operand_list(first: u32, count: u32) -> String {
    let list: Vec<String> = (first..first + count).map(|index| format!("{{{index}}}")).collect();
    format!("{{{{{}}}}}", list.join(", "))
}

/// S += Q K^T, in k-steps of `depth` channels. Both operands are K-major images, in which a step
/// begins at `offset` (in 16 bytes).
fn start_scores(ptx: &str, depth: u32, head_dim: u32, key_rows: u32, offset: impl Fn(u32) -> u32) -> TokenStream {
    let count = key_rows / 2;
    let (q, k) = (format!("{{{count}}}"), format!("{{{}}}", count + 1));
    let mut lines = vec![
        "{{".to_string(),
        ".reg .pred %add;".to_string(),
        ".reg .b64 %q, %k;".to_string(),
        "setp.eq.b32 %add, 0, 0;".to_string(),
        "wgmma.fence.sync.aligned;".to_string(),
    ];
    // Only 16-bit products can transpose an operand.
    let transposed = if depth == 16 { ", 0, 0" } else { "" };
    for step in 0..head_dim / depth {
        let offset = offset(step);
        lines.push(format!("add.s64 %q, {q}, {offset};"));
        lines.push(format!("add.s64 %k, {k}, {offset};"));
        lines.push(format!(
            "wgmma.mma_async.sync.aligned.m64n{key_rows}k{depth}.f32.{ptx}.{ptx} {}, %q, %k, %add, 1, 1{transposed};",
            operand_list(0, count)
        ));
    }
    lines.push("wgmma.commit_group.sync.aligned;".to_string());
    lines.push("}}".to_string());
    let registers = fields("r", count);
    quote! {
        ::core::arch::asm!(#(#lines,)* #(inout(reg32) scores.#registers,)* in(reg64) q.0, in(reg64) k.0, options(nostack));
    }
}

/// O += P V, in key_rows / 16 k-steps of 16 rows. P is in registers, and V is an image that is read
/// MN-major (transposed), `columns` wide.
fn start_output(image: Image, key_rows: u32, columns: u32) -> TokenStream {
    let ptx = image.dtype.as_str();
    let product = format!("m64n{columns}k16.f32.{ptx}.{ptx}");
    let steps = Steps { product: &product, transposed: ", 1", first_adds: true };
    output_steps(steps, columns, key_rows / 16, key_rows / 4, |step| image.chunk(16 * step, 0) / 16)
}

/// O = P V in 8 bits, in key_rows / 32 k-steps of two units of V, whose image is K-major.
fn start_output_e4m3(key_rows: u32) -> TokenStream {
    let product = "m64n128k32.f32.e4m3.e4m3";
    let steps = Steps { product, transposed: "", first_adds: false };
    output_steps(steps, 128, key_rows / 32, key_rows / 8, |step| 2 * step * e4m3::UNIT_BYTES / 16)
}

/// How the k-steps of P V are written.
struct Steps<'a> {
    product: &'a str,
    /// The operand that says whether V is transposed.
    transposed: &'a str,
    /// Whether the first step adds to what the accumulator holds.
    first_adds: bool,
}

/// The k-steps of P V. Each takes four registers of weights, and its part of V begins at `offset`
/// (in 16 bytes).
fn output_steps(
    Steps { product, transposed, first_adds }: Steps,
    columns: u32,
    steps: u32,
    weights: u32,
    offset: impl Fn(u32) -> u32,
) -> TokenStream {
    let count = columns / 2;
    let v = format!("{{{}}}", count + weights);
    let mut lines = vec![
        "{{".to_string(),
        ".reg .pred %add;".to_string(),
        ".reg .b64 %v;".to_string(),
        format!("setp.{}.b32 %add, 0, 0;", if first_adds { "eq" } else { "ne" }),
        "wgmma.fence.sync.aligned;".to_string(),
    ];
    for step in 0..steps {
        let offset = offset(step);
        lines.push(format!("add.s64 %v, {v}, {offset};"));
        lines.push(format!(
            "wgmma.mma_async.sync.aligned.{product} {}, {}, %v, %add, 1, 1{transposed};",
            operand_list(0, count),
            operand_list(count + 4 * step, 4)
        ));
        if step == 0 && !first_adds {
            lines.push("setp.eq.b32 %add, 0, 0;".to_string());
        }
    }
    lines.push("wgmma.commit_group.sync.aligned;".to_string());
    lines.push("}}".to_string());
    let (registers, weights) = (fields("r", count), fields("a", weights));
    let direction = if first_adds { quote!(inout) } else { quote!(out) };
    quote! {
        ::core::arch::asm!(
            #(#lines,)*
            #(#direction(reg32) output.#registers,)*
            #(in(reg32) weights.#weights,)*
            in(reg64) v.0,
            options(nostack)
        );
    }
}
