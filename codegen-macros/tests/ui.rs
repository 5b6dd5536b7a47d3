//! Wrong use is a compile error at the user's token.

#[test]
fn wrong_use() {
    trybuild::TestCases::new().compile_fail("tests/ui/*.rs");
}
