//! The C interface. `include/framestride.h` is made of this crate's items, in the order of its
//! modules, and of their documentation, which is therefore written for readers of C.
//!
//! * `argument`, `handle`: what comes from the caller.
//! * `status`: what every function returns, and the message behind it.
//! * `device`, `spec`, `module`, `attention`: one kind of handle each, and its functions.
//! * `study`: what masks would cost a model.
//! * `call`: the structure of a call, and what it becomes for the library.
#![allow(non_camel_case_types, clippy::missing_safety_doc)]

// Empty lines keep these in the order of the header.

mod argument;

mod handle;

mod status;

mod device;

mod spec;

mod module;

mod call;

mod attention;

mod study;
