//! The C interface. `include/framestride.h` is made of this crate's items, in the order of its
//! modules, and of their documentation, which is therefore written for readers of C.
#![allow(non_camel_case_types, clippy::missing_safety_doc)]

// What comes from the caller: handles, texts, and structures that begin with their size.
mod handle;

// What every function returns, and the message behind it.
mod status;

mod device;

mod spec;

mod module;

// The structure of a call, and what it becomes for the library.
mod call;

mod attention;
