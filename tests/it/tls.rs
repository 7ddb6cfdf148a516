//! `https://` upstreams: the authority and the name are checked.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{ServerConfig, pki_types::PrivateKeyDer};
use tests::{Gateway, Origin, Reply, send};

/// An authority's certificate as PEM, and a server that it vouches for under these names.
pub(crate) fn authority(names: &[&str]) -> (String, Arc<ServerConfig>) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&ca_key).unwrap();
    let issuer = Issuer::new(params, ca_key);
    let key = KeyPair::generate().unwrap();
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
        .unwrap();
    (ca.pem(), Arc::new(config))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_right_authority_and_the_right_name_or_nothing() {
    let (pem, config) = authority(&["localhost"]);
    let (_, stranger) = authority(&["localhost"]);
    let good = Origin::start_with(Some(config), |_| Reply::ok("secret")).await;
    let wrong = Origin::start_with(Some(stranger), |_| Reply::ok("secret")).await;
    // It speaks no TLS.
    let plain = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let plain_port = plain.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for tcp in plain.incoming() {
            let _ = std::io::Write::write_all(&mut tcp.unwrap(), b"HTTP/1.1 400 Bad Request\r\n\r\n");
        }
    });
    let folder = tests::folder();
    std::fs::write(folder.path().join("ca.pem"), pem).unwrap();
    let file = folder.path().join("routes.yaml");
    let port = good.address.port();
    let upstreams = [
        ("legacy", format!("https://localhost:{port}")),
        ("name", format!("https://127.0.0.1:{port}")),
        ("stranger", format!("https://localhost:{}", wrong.address.port())),
        ("plain", format!("https://localhost:{plain_port}")),
    ];
    let text: String =
        upstreams.iter().map(|(name, url)| format!("  {name}: {{url: \"{url}\", ca: ca.pem}}\n")).collect();
    let routes: String = ["name", "stranger", "plain"]
        .map(|name| format!("  - {{match: /{name}, upstream: {name}, stage: migrated, fallback: none}}\n"))
        .concat();
    std::fs::write(&file, Gateway::whole(&format!("upstreams:\n{text}  system: {{url: \"https://localhost:{port}\"}}\nroutes:\n{routes}  - {{match: /system, upstream: system, stage: migrated, fallback: none}}\n"))).unwrap();
    let gateway = Gateway::start_on(&file, &[]).await;
    assert_eq!(send(gateway.address, "GET", "/", &[], "").await.text(), "secret");
    for (name, error) in [
        ("name", "tls_certificate_error"),
        ("stranger", "tls_certificate_error"),
        ("system", "tls_certificate_error"),
        ("plain", "tls_protocol_error"),
    ] {
        let answer = send(gateway.address, "GET", &format!("/{name}"), &[], "").await;
        assert_eq!(
            (answer.status, answer.field("proxy-status")),
            (502, format!("gw; error={error}; next-hop={name}").as_str())
        );
    }
    assert_eq!((good.count(), wrong.count()), (1, 0));
}
