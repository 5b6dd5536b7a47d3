//! `attention_kernels!`: turns a spec, from its file or spelled out, into constants and kernel
//! entries. A template has literals that are filled in later, in place of the constants
//! ([`framestride_shapes::numbers`]).
//!
//! The spelled-out form becomes the lines of a TOML file, which the same parser reads. So both
//! forms have the same keys, defaults and checks. An error of a line is reported at the tokens that
//! it came from.

use framestride_shapes::arch::Products;
use framestride_shapes::blocks::{
    CENTER_THREADS, PROFILE_COLUMNS, PROFILE_KEY_ROWS, PROFILE_THREADS, PackBlock, SELECT_THREADS, Tiles,
    VALUES_MIN_BLOCKS, VALUES_THREADS, WARP_BLOCKS, profile_min_blocks, profile_parts, profile_warps,
};
use framestride_shapes::dtype::{Compute, Dtype};
use framestride_shapes::image::{Image, e4m3};
use framestride_shapes::layout::{Divisor, HeadType};
use framestride_shapes::numbers::{Number, Numbers, PREFIX, Template};
use framestride_shapes::shared::{
    AttentionShared, CenterShared, PackShared, ProfileShared, SelectShared, ValuesShared, WarpAttentionShared,
    WarpProfileShared,
};
use framestride_shapes::spec::{Lines, Problem, Spec, SpecError};
use proc_macro2::{Ident, Literal, Span, TokenStream};
use quote::{format_ident, quote};
use std::path::PathBuf;
use syn::parse::{Parse, ParseStream, Parser};
use syn::spanned::Spanned;
use syn::{Error, Expr, LitStr, Result, Token, braced};

pub fn expand(input: TokenStream) -> Result<TokenStream> {
    let parse = |input: ParseStream| {
        let krate = crate::kernels_crate(input)?;
        let first = input.fork().parse::<Ident>().map(|name| name.to_string()).unwrap_or_default();
        match first.as_str() {
            "template" => Ok(kernels(&krate, &Target::Template(template(input)?))),
            "spec" => Ok(of_spec(&krate, from_file(input)?)),
            _ => Ok(of_spec(&krate, spelled_out(input)?)),
        }
    };
    parse.parse2(input)
}

/// The kernels of a spec, and its text.
fn of_spec(krate: &TokenStream, Shape { spec, text, file }: Shape) -> TokenStream {
    let kernels = kernels(krate, &Target::Spec(Box::new(spec)));
    let (length, bytes) = (text.len(), Literal::byte_string(text.as_bytes()));
    let rebuilt_for = file.map(|file| {
        quote!(
            const _: &[u8] = include_bytes!(#file);
        )
    });
    quote! {
        #rebuilt_for

        #kernels

        #[doc(hidden)]
        #[used]
        #[unsafe(no_mangle)]
        #[allow(non_upper_case_globals)]
        pub static framestride_spec: [u8; #length] = *#bytes;
    }
}

/// What kernels are written for.
enum Target {
    /// One spec.
    Spec(Box<Spec>),
    /// Every spec that has this template.
    Template(Template),
}

impl Target {
    fn template(&self) -> Template {
        match self {
            Target::Spec(spec) => spec.template(),
            Target::Template(template) => *template,
        }
    }

    /// The fields of `Numbers`, and how the model writes each.
    fn numbers(&self, krate: &TokenStream) -> Vec<(Ident, TokenStream)> {
        let numbers = match self {
            Target::Spec(spec) => Numbers::of(spec, crate::arch()),
            // Only the types of its fields are looked at.
            Target::Template(_) => Numbers::default(),
        };
        let divisor = quote!(#krate::shapes::layout::Divisor);
        let field = |(name, number): (&str, Number)| {
            let literals = number.literals(name).into_iter().map(|(name, _)| {
                let name = format!("{PREFIX}{name}");
                quote!(#krate::literal!(#name))
            });
            let value = match (self, number) {
                (Target::Spec(_), Number::U32(value)) => quote!(#value),
                (Target::Spec(_), Number::Bool(value)) => quote!(#value),
                (Target::Spec(_), Number::F32(value)) => quote!(#value),
                (Target::Spec(_), Number::Divisor(Divisor { value, .. })) => quote!(const { #divisor::new(#value) }),
                (Target::Template(_), Number::U32(_)) => quote!(#(#literals)*),
                (Target::Template(_), Number::Bool(_)) => quote!(#(#literals)* != 0),
                (Target::Template(_), Number::F32(_)) => quote!(f32::from_bits(#(#literals)*)),
                (Target::Template(_), Number::Divisor(_)) => quote!(#divisor::from_parts([#(#literals),*])),
            };
            (Ident::new(name, Span::call_site()), value)
        };
        numbers.fields().into_iter().map(field).collect()
    }
}

/// `template = { head_dim = 128, dtype = bf16, compute = dtype }`.
fn template(input: ParseStream) -> Result<Template> {
    let entry: Entry = input.parse()?;
    let (mut head_dim, mut dtype, mut compute) = (None, None, None);
    for part in &entry.inner {
        let (name, value) = (part.name.to_string(), part.toml());
        match name.as_str() {
            "head_dim" => head_dim = [64, 128].into_iter().find(|head_dim| value == head_dim.to_string()),
            "dtype" => dtype = Dtype::ALL.into_iter().find(|dtype| value == format!("{:?}", dtype.as_str())),
            "compute" => {
                compute = Compute::ALL.into_iter().find(|compute| value == format!("{:?}", compute.as_str()));
            }
            _ => return Err(Error::new(part.name.span(), "unknown key; allowed: head_dim, dtype, compute")),
        }
    }
    input.parse::<Option<Token![,]>>()?;
    let template = head_dim.zip(dtype).zip(compute);
    let template = template.map(|((head_dim, dtype), compute)| Template { image: Image { head_dim, dtype }, compute });
    match template.filter(|template| input.is_empty() && Template::ALL.contains(template)) {
        Some(template) => Ok(template),
        None => {
            let rule = "write `template = { head_dim = 64 or 128, dtype = bf16 or f16, compute = dtype or e4m3 }`, \
                        e4m3 with head_dim = 128";
            Err(Error::new(entry.span(), rule))
        }
    }
}

/// What the macro was given.
struct Shape {
    spec: Spec,
    /// The spec as TOML. The builder takes it out of the LLVM IR and copies it to the manifest.
    text: String,
    /// The file in which it stands. When that changes, the crate must be built again.
    file: Option<String>,
}

/// `spec = "path"`.
fn from_file(input: ParseStream) -> Result<Shape> {
    input.parse::<Ident>()?;
    input.parse::<Token![=]>()?;
    let path: LitStr = input.parse()?;
    input.parse::<Option<Token![,]>>()?;
    if !input.is_empty() {
        return Err(input.error("nothing may follow the path: the file states the whole shape"));
    }
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let file = root.join(path.value());
    let spec = Spec::from_file(&file).map_err(|error| {
        // Messages have the path as the user wrote it, not where this build happens to stand.
        let lines = error.problems.iter().map(|problem| match problem.line {
            0 => format!("{}: {}", path.value(), message(problem).trim_start()),
            line => format!("{}:{line}: {}", path.value(), message(problem)),
        });
        Error::new(path.span(), lines.collect::<Vec<_>>().join("\n"))
    })?;
    let text = std::fs::read_to_string(&file).map_err(|error| Error::new(path.span(), error))?;
    Ok(Shape { spec, text, file: Some(file.display().to_string()) })
}

/// `name = value`, or `name = kind { name = value, ... }`.
struct Entry {
    name: Ident,
    value: Option<Expr>,
    kind: Option<Ident>,
    inner: Vec<Entry>,
}

impl Parse for Entry {
    fn parse(input: ParseStream) -> Result<Entry> {
        let name: Ident = input.parse()?;
        input.parse::<Token![=]>()?;
        let (mut value, mut kind, mut inner) = (None, None, Vec::new());
        if input.peek(syn::Ident) && !input.peek(syn::LitBool) {
            kind = Some(input.parse()?);
        } else if !input.peek(syn::token::Brace) {
            value = Some(input.parse()?);
        }
        if value.is_none() && input.peek(syn::token::Brace) {
            let body;
            braced!(body in input);
            inner = body.parse_terminated(Entry::parse, Token![,])?.into_iter().collect();
        }
        Ok(Entry { name, value, kind, inner })
    }
}

impl Entry {
    /// The value as TOML writes it.
    fn toml(&self) -> String {
        match (&self.value, &self.kind) {
            (Some(value), _) => quote!(#value).to_string(),
            (None, Some(kind)) => format!("{:?}", kind.to_string()),
            (None, None) => "{}".into(),
        }
    }

    fn span(&self) -> Span {
        let value = self.value.as_ref().map(Spanned::span).or(self.kind.as_ref().map(Ident::span));
        value.unwrap_or_else(|| self.name.span())
    }
}

fn spelled_out(input: ParseStream) -> Result<Shape> {
    let whole = input.span();
    let mut lines = Lines::new();
    let mut named = false;
    for entry in input.parse_terminated(Entry::parse, Token![,])? {
        let name = entry.name.to_string();
        // The kind of such a table stands before its braces: `rope = half { text = true }`.
        let table = match name.as_str() {
            "text" => Some(("text".to_string(), Some("position"))),
            "qk_norm" => Some(("qk_norm".to_string(), Some("kind"))),
            "rope" => Some(("rope".to_string(), Some("pairs"))),
            "before" | "after" | "profile" | "precision" | "schedule" => Some((name.clone(), None)),
            "mask" => {
                Some((format!("masks.{}", entry.kind.as_ref().map(ToString::to_string).unwrap_or_default()), None))
            }
            _ => None,
        };
        if let Some((table, kind_key)) = table {
            if let Some(value) = &entry.value {
                let message = format!("`{name}` is a table: write `{name} = kind {{ key = value }}`");
                return Err(Error::new_spanned(value, message));
            }
            if name == "mask" && entry.kind.is_none() {
                return Err(Error::new(entry.name.span(), "write `mask = spatial { .. }` or `mask = temporal { .. }`"));
            }
            lines.table(&table);
            if let (Some(key), Some(kind)) = (kind_key, &entry.kind) {
                lines.push(&table, key, &format!("{:?}", kind.to_string()), kind.span());
            }
            for inner in &entry.inner {
                lines.push(&table, &inner.name.to_string(), &inner.toml(), inner.span());
            }
            continue;
        }
        let (table, key) = match name.as_str() {
            "name" => ("", "name"),
            "frames" | "tokens_per_frame" | "grid" => ("video", name.as_str()),
            "heads" | "head_dim" | "dtype" | "batch" | "compute" => ("attention", name.as_str()),
            "sink_frames" => ("sink", "frames"),
            _ => {
                let message = format!(
                    "unknown key `{name}`; allowed: spec, name, frames, tokens_per_frame, grid, text, before, after, heads, \
                     head_dim, dtype, batch, compute, qk_norm, rope, mask, sink_frames, profile, precision, schedule"
                );
                return Err(Error::new(entry.name.span(), message));
            }
        };
        named |= key == "name";
        lines.push(table, key, &entry.toml(), entry.span());
    }
    if !named {
        lines.push("", "name", "\"spelled_out\"", whole);
    }
    let (text, spans) = lines.text(whole);
    let spec = Spec::parse("attention_kernels!", &text).map_err(|error| at_tokens(error, &spans, whole))?;
    Ok(Shape { spec, text, file: None })
}

fn message(problem: &Problem) -> String {
    format!("{} {}; allowed: {}; {}", problem.key, problem.found, problem.allowed, problem.mend)
}

/// Reports each problem of a spec at the tokens that its line came from.
fn at_tokens(error: SpecError, spans: &[Span], whole: Span) -> Error {
    let mut errors = error.problems.iter().map(|problem| {
        let span = spans.get((problem.line as usize).wrapping_sub(1)).copied().unwrap_or(whole);
        Error::new(span, message(problem))
    });
    let mut all = errors.next().unwrap_or_else(|| Error::new(whole, "the shape is not valid"));
    errors.for_each(|error| all.combine(error));
    all
}

/// What kernels of a family are made of.
struct Family {
    /// Modules of the bodies of **attention** and **profile**.
    attention: TokenStream,
    profile: TokenStream,
    /// The macro of products.
    products: TokenStream,
    /// Blocks of 16 rows that multiply together in **attention**. Warpgroups have none.
    attention_blocks: Vec<u32>,
    /// Those in **profile**.
    profile_blocks: Vec<u32>,
    /// Keys of a tile of **profile** that a warp weighs.
    profile_keys: u32,
    /// Columns of V that a warp of **profile** has.
    columns: u32,
    profile_threads: u32,
    attention_shared: u32,
    profile_shared: u32,
}

/// Writes the models and the entries. `krate` is the path of `framestride_kernels`.
///
/// Kernels in 8 bits go beside those of the tensors' type, which profile, and with a bound of
/// errors compute the heads that 8 bits are not enough for. A spec has both. The template in 8 bits
/// has its own alone, since the other is loaded beside it.
fn kernels(krate: &TokenStream, target: &Target) -> TokenStream {
    let Template { image, compute } = target.template();
    let computes: &[Compute] = match (target, compute) {
        (Target::Spec(_), Compute::E4m3) => &Compute::ALL,
        (Target::Template(_), Compute::E4m3) => &[Compute::E4m3],
        (_, Compute::Dtype) => &[Compute::Dtype],
    };
    computes.iter().map(|&compute| kernels_of(krate, target, image, compute)).collect()
}

/// The model and the entries of what multiplies one type.
fn kernels_of(krate: &TokenStream, target: &Target, image: Image, compute: Compute) -> TokenStream {
    let arch = crate::arch();
    let (head_dim, tiles) = (image.head_dim, Tiles::new(arch, image.head_dim, compute));
    let Tiles { query_rows, key_rows, stages, key_step } = tiles;
    let element = match image.dtype {
        Dtype::Bf16 => quote!(Bf16),
        Dtype::F16 => quote!(F16),
    };
    let (names, values): (Vec<_>, Vec<_>) = target.numbers(krate).into_iter().unzip();
    let (row_bytes, multiplied, suffix, precision) = match compute {
        Compute::Dtype => (image.bytes(1), element.clone(), "", quote!(Dtype)),
        Compute::E4m3 => (e4m3::ROW_BYTES, quote!(E4m3), "E4m3", quote!(E4m3)),
    };
    let model = format_ident!("SpecModel{suffix}");
    let attention_products = format_ident!("AttentionProducts{suffix}");
    let profile_products = format_ident!("ProfileProducts{suffix}");
    // Bodies are named for the first family that they were written for.
    let family = match arch.products {
        Products::Wgmma => Family {
            attention: quote!(attention::sm90),
            profile: quote!(profile),
            products: quote!(tile_products),
            attention_blocks: vec![],
            profile_blocks: vec![],
            profile_keys: PROFILE_KEY_ROWS,
            columns: PROFILE_COLUMNS,
            profile_threads: PROFILE_THREADS,
            attention_shared: AttentionShared::new(tiles, row_bytes, compute).bytes,
            profile_shared: ProfileShared::new(image).bytes,
        },
        Products::MmaSync => Family {
            attention: quote!(attention::sm80),
            profile: quote!(profile::sm80),
            products: quote!(warp_products),
            attention_blocks: vec![WARP_BLOCKS as u32],
            // Outputs of one mask alone, and of all.
            profile_blocks: vec![1, 2, HeadType::ALL.len() as u32],
            profile_keys: PROFILE_KEY_ROWS / profile_parts(image),
            columns: head_dim / profile_parts(image),
            profile_threads: 32 * profile_warps(image),
            attention_shared: WarpAttentionShared::new(tiles, image).bytes,
            profile_shared: WarpProfileShared::new(image).bytes,
        },
    };
    let Family { attention, profile, products, attention_blocks, profile_blocks, profile_keys, columns, .. } = &family;
    let Family { profile_threads, attention_shared, profile_shared, .. } = family;
    let pack = match target {
        Target::Spec(spec) => PackBlock::new(arch, spec.heads, image),
        Target::Template(_) => PackBlock::LARGEST,
    };
    let (pack_threads, pack_blocks) = (pack.threads(), pack.min_blocks);
    // The largest block of a template may be more than any spec of the family has.
    let pack_shared = PackShared::new(pack.warps, pack.held_steps).bytes.min(arch.block_shared_bytes);
    let profile_min_blocks = profile_min_blocks(arch, head_dim);
    let select_shared = SelectShared::new(SELECT_THREADS).bytes;
    let (attention_threads, attention_min_blocks) = (tiles.threads(arch), Tiles::min_blocks(arch));
    let center_shared = CenterShared::new().bytes;
    let values_shared = ValuesShared::new().bytes;
    let [in_16_bits, in_8_bits] = match target {
        Target::Spec(spec) => spec.precisions(),
        Target::Template(_) => [true; 2],
    };
    let attend = in_16_bits.then(|| {
        quote! {
            /// Sparse attention.
            #[#krate::kernel(threads = #attention_threads, min_blocks = #attention_min_blocks, shared_bytes = #attention_shared)]
            pub unsafe fn attention(params: #krate::shapes::params::AttentionParams) {
                unsafe { #krate::#attention::attention::<#model>(&params) }
            }
        }
    });
    let judge = (in_16_bits && in_8_bits).then(|| {
        quote! {
            /// The choice of each head's precision.
            #[#krate::kernel(threads = #SELECT_THREADS, shared_bytes = #select_shared)]
            pub unsafe fn judge(params: #krate::shapes::params::JudgeParams) {
                unsafe { #krate::judge::judge::<#model>(&params) }
            }
        }
    });
    let entries = match compute {
        Compute::Dtype => quote! {
            /// Norm, RoPE and reordering into packed images.
            #[#krate::kernel(threads = #pack_threads, min_blocks = #pack_blocks, shared_bytes = #pack_shared)]
            pub unsafe fn pack(params: #krate::shapes::params::PackParams) {
                unsafe { #krate::pack::pack::<#model>(&params) }
            }

            /// Attention of sampled rows under every mask.
            #[#krate::kernel(threads = #profile_threads, min_blocks = #profile_min_blocks, shared_bytes = #profile_shared)]
            pub unsafe fn profile(params: #krate::shapes::params::ProfileParams) {
                unsafe { #krate::#profile::profile::<#model>(&params) }
            }

            /// The choice of each head's mask.
            #[#krate::kernel(threads = #SELECT_THREADS, shared_bytes = #select_shared)]
            pub unsafe fn select(params: #krate::shapes::params::SelectParams) {
                unsafe { #krate::select::select::<#model>(&params) }
            }

            #attend
        },
        Compute::E4m3 => quote! {
            /// Centers of V for attention in 8 bits.
            #[#krate::kernel(threads = #CENTER_THREADS, shared_bytes = #center_shared)]
            pub unsafe fn center(params: #krate::shapes::params::PackParams) {
                unsafe { #krate::pack::e4m3::center::<#model>(&params) }
            }

            /// Norm, RoPE and reordering of Q and K into packed images of 8 bits.
            #[#krate::kernel(threads = #pack_threads, min_blocks = #pack_blocks, shared_bytes = #pack_shared)]
            pub unsafe fn pack_e4m3(params: #krate::shapes::params::PackParams) {
                unsafe { #krate::pack::pack::<#model>(&params) }
            }

            /// Reordering of V into transposed images of 8 bits.
            #[#krate::kernel(threads = #VALUES_THREADS, min_blocks = #VALUES_MIN_BLOCKS, shared_bytes = #values_shared)]
            pub unsafe fn pack_values(params: #krate::shapes::params::PackParams) {
                unsafe { #krate::pack::e4m3::pack_values::<#model>(&params) }
            }

            /// Sparse attention in 8 bits.
            #[#krate::kernel(threads = #attention_threads, min_blocks = #attention_min_blocks, shared_bytes = #attention_shared)]
            pub unsafe fn attention_e4m3(params: #krate::shapes::params::AttentionParams) {
                unsafe { #krate::#attention::attention_e4m3::<#model>(&params) }
            }

            #judge
        },
    };
    let doc = match target {
        Target::Spec(spec) => format!("The model that `{}` declares.", spec.name),
        Target::Template(_) => "Any model, whose numbers are literals that are filled in later.".to_string(),
    };
    quote! {
        #[doc = #doc]
        pub struct #model;

        #krate::#products! {
            pub struct #attention_products;
            element = #multiplied, key_rows = #key_rows, head_dim = #head_dim, blocks = [#(#attention_blocks),*]
        }
        #krate::#products! {
            pub struct #profile_products;
            element = #element, key_rows = #profile_keys, head_dim = #head_dim, columns = #columns,
            blocks = [#(#profile_blocks),*]
        }

        impl #krate::model::Model for #model {
            #[inline(always)]
            fn numbers() -> #krate::shapes::numbers::Numbers {
                #krate::shapes::numbers::Numbers { #(#names: #values,)* }
            }

            const HEAD_DIM: u32 = #head_dim;
            const TILES: #krate::shapes::blocks::Tiles =
                #krate::shapes::blocks::Tiles {
                    query_rows: #query_rows, key_rows: #key_rows, stages: #stages, key_step: #key_step,
                };
            const COMPUTE: #krate::shapes::dtype::Compute = #krate::shapes::dtype::Compute::#precision;
            type Element = #krate::element::#element;
            type Attention = #attention_products;
            type Profile = #profile_products;
        }

        #entries
    }
}
