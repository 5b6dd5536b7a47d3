//! Gives the shared library its name. Programs that were linked with a path to it then look for the
//! name alone.

fn main() {
    if std::env::var_os("CARGO_CFG_TARGET_OS").is_some_and(|os| os == "linux") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libframestride.so");
    }
    println!("cargo::rerun-if-changed=build.rs");
}
