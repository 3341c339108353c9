pub(crate) fn cases() -> Vec<crate::suite::Entry> {
    vec![]
}
