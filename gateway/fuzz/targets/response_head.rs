//! A response's head, to each kind of request: what is accepted ends where everybody says it ends.
#![no_main]

use gateway::http1::{
    head::{Framing, parse_response},
    write,
};
use http::{Method, StatusCode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for method in [Method::GET, Method::HEAD] {
        let Ok(Some((head, length))) = parse_response(bytes, 2048, &method) else { continue };
        assert!(length <= 2048 && bytes[..length].ends_with(b"\r\n\r\n"));
        let bodyless = method == Method::HEAD
            || head.status.is_informational()
            || matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        assert_eq!(bodyless, head.bodyless);
        assert!(!bodyless || head.framing == Framing::None);
        for hop in ["connection", "transfer-encoding", "keep-alive", "upgrade", "te", "proxy-connection"] {
            assert!(!head.headers.contains_key(hop));
        }
        assert!(head.headers.get_all("content-length").iter().count() <= 1);
        if head.framing == Framing::Close {
            assert!(!head.keep_alive);
        }
        // Written anew it is read as the same, less what was the connection's.
        let mut out = Vec::new();
        let told = write::begin_response(&mut out, head.status, &head.headers);
        out.extend_from_slice(b"\r\n");
        let (anew, _) = parse_response(&out, 8192, &method).unwrap().unwrap();
        assert_eq!((anew.status, &anew.headers), (head.status, &head.headers));
        if let Framing::Length(length) = head.framing {
            assert_eq!(told.length, Some(length));
        }
    }
});
