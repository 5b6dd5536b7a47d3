//! `#[kernel]`: makes a function an `extern "ptx-kernel"` entry, and writes its row of the launch
//! table.
//!
//! The row is a JSON object in a static named `framestride_launch_<entry>`. The builder takes it
//! out of the LLVM IR, writes the launch bounds that rustc cannot express, and copies it to the
//! manifest. So entry and manifest cannot disagree.

use proc_macro2::{Literal, TokenStream};
use quote::{ToTokens, format_ident, quote};
use syn::spanned::Spanned;
use syn::{Error, FnArg, ItemFn, LitInt, Pat, Result, ReturnType, Type, TypePath, parse::Parser};

/// Arguments of the attribute.
struct Bounds {
    threads: u32,
    min_blocks: u32,
    shared_bytes: u32,
}

pub fn expand(arguments: TokenStream, item: TokenStream) -> Result<TokenStream> {
    let bounds = parse_bounds(arguments)?;
    let function: ItemFn = syn::parse2(item)?;
    let parameters = valid_parameters(&function)?;
    Ok(entry(&function, &launch_row(&function, &bounds, &parameters)))
}

fn parse_bounds(arguments: TokenStream) -> Result<Bounds> {
    let span = arguments.span();
    let (mut threads, mut min_blocks, mut shared_bytes) = (None, None, None);
    let parser = syn::meta::parser(|meta| {
        let slot = match meta.path.get_ident().map(ToString::to_string).as_deref() {
            Some("threads") => &mut threads,
            Some("min_blocks") => &mut min_blocks,
            Some("shared_bytes") => &mut shared_bytes,
            _ => return Err(meta.error("unknown argument; allowed: threads, min_blocks, shared_bytes")),
        };
        let value: LitInt = meta.value()?.parse()?;
        let (name, number) = (meta.path.to_token_stream(), value.base10_parse::<u32>()?);
        let arch = crate::arch();
        let allowed = match name.to_string().as_str() {
            "threads" => 1..=arch.block_threads,
            "min_blocks" => 1..=arch.blocks,
            _ => 0..=arch.block_shared_bytes,
        };
        if !allowed.contains(&number) {
            let message = format!("{name} = {number} is out of range: {} to {}", allowed.start(), allowed.end());
            return Err(Error::new(value.span(), message));
        }
        if slot.replace(number).is_some() {
            return Err(meta.error(format!("{name} is given twice")));
        }
        Ok(())
    });
    parser.parse2(arguments)?;
    let threads = threads.ok_or_else(|| Error::new(span, "`threads` is missing: #[kernel(threads = 256)]"))?;
    Ok(Bounds { threads, min_blocks: min_blocks.unwrap_or(1), shared_bytes: shared_bytes.unwrap_or(0) })
}

/// Names and types of the parameters, or what keeps the function from being an entry.
fn valid_parameters(function: &ItemFn) -> Result<Vec<(String, String)>> {
    let signature = &function.sig;
    if signature.unsafety.is_none() {
        return Err(Error::new(
            signature.fn_token.span,
            "a kernel must be an `unsafe fn`: its launch vouches for its arguments",
        ));
    }
    if let Some(wrong) = &signature.abi {
        return Err(Error::new_spanned(wrong, "the macro sets the ABI: write a plain `unsafe fn`"));
    }
    if !signature.generics.params.is_empty() {
        return Err(Error::new_spanned(
            &signature.generics,
            "an entry has one address and cannot be generic: call a generic function from it",
        ));
    }
    if let ReturnType::Type(_, returned) = &signature.output {
        return Err(Error::new_spanned(returned, "a kernel returns nothing: store results in memory"));
    }
    signature
        .inputs
        .iter()
        .map(|input| match input {
            FnArg::Receiver(receiver) => Err(Error::new_spanned(receiver, "a kernel has no `self`")),
            FnArg::Typed(typed) => match (&*typed.pat, &*typed.ty) {
                (_, Type::Reference(reference)) => Err(Error::new_spanned(
                    reference,
                    "a kernel's argument is copied at launch: pass a device address as `u64`, or a value",
                )),
                (Pat::Ident(name), ty) => Ok((name.ident.to_string(), type_name(ty))),
                (pattern, _) => Err(Error::new_spanned(pattern, "name this argument: the manifest lists it")),
            },
        })
        .collect()
}

/// The manifest's name of a type. A block of parameters has its own name, wherever it lies.
fn type_name(ty: &Type) -> String {
    match ty {
        Type::Path(TypePath { qself: None, path }) => path.segments.last().to_token_stream().to_string(),
        _ => ty.to_token_stream().to_string(),
    }
}

/// One row of the launch table, as JSON.
fn launch_row(function: &ItemFn, bounds: &Bounds, parameters: &[(String, String)]) -> String {
    let parameters: Vec<String> =
        parameters.iter().map(|(name, ty)| format!(r#"{{"name":"{name}","type":"{ty}"}}"#)).collect();
    format!(
        r#"{{"entry":"{}","threads":{},"min_blocks":{},"shared_bytes":{},"params":[{}]}}"#,
        function.sig.ident,
        bounds.threads,
        bounds.min_blocks,
        bounds.shared_bytes,
        parameters.join(",")
    )
}

fn entry(function: &ItemFn, row: &str) -> TokenStream {
    let ItemFn { attrs, vis, sig, block } = function;
    let (name, inputs) = (&sig.ident, &sig.inputs);
    let table = format_ident!("framestride_launch_{}", name);
    let (length, bytes) = (row.len(), Literal::byte_string(row.as_bytes()));
    quote! {
        #(#attrs)*
        #[unsafe(no_mangle)]
        #vis unsafe extern "ptx-kernel" fn #name(#inputs) #block

        #[doc(hidden)]
        #[used]
        #[unsafe(no_mangle)]
        #[allow(non_upper_case_globals)]
        pub static #table: [u8; #length] = *#bytes;
    }
}
