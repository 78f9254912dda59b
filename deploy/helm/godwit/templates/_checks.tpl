{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{- /* What values.schema.json cannot say: values that need each other. Each names the value. */ -}}
{{- define "godwit.checks" -}}
{{- $tls := .Values.tls -}}
{{- if and (eq $tls.mode "certManager") (not $tls.certManager.issuer.name) -}}
{{- fail "tls.certManager.issuer.name is needed with tls.mode certManager" -}}
{{- end -}}
{{- if and (eq $tls.mode "certManager") (not $tls.certManager.nodes) -}}
{{- fail "tls.certManager.nodes is needed with tls.mode certManager: each node has a certificate of its own" -}}
{{- end -}}
{{- if eq $tls.mode "existing" -}}
{{- range $name := list "orchestratorSecret" "viewerSecret" -}}
{{- if not (index $tls.existing $name) -}}
{{- fail (printf "tls.existing.%s is needed with tls.mode existing" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with .Values.orchestrator.store -}}
{{- if and (eq .type "postgresql") (not .postgresql.secretName) -}}
{{- fail "orchestrator.store.postgresql.secretName is needed with orchestrator.store.type postgresql" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.auth.oidc.issuer (not .Values.auth.oidc.audience) -}}
{{- fail "auth.oidc.audience is needed with auth.oidc.issuer: a token for somebody else must not count here" -}}
{{- end -}}
{{- if and .Values.orchestrator.evictionWebhook.enabled (eq $tls.mode "plaintext") -}}
{{- fail "orchestrator.evictionWebhook.enabled needs TLS: the API server calls nothing else; tls.mode is plaintext" -}}
{{- end -}}
{{- if and .Values.orchestrator.evictionWebhook.enabled (not .Values.orchestrator.controller.enabled) -}}
{{- fail "orchestrator.evictionWebhook.enabled needs orchestrator.controller.enabled" -}}
{{- end -}}
{{- if and .Values.orchestrator.evictionWebhook.enabled (eq $tls.mode "existing") (not .Values.orchestrator.evictionWebhook.caBundle) -}}
{{- fail "orchestrator.evictionWebhook.caBundle is needed with tls.mode existing" -}}
{{- end -}}
{{- if and .Values.auth.tokensSecret (eq $tls.mode "plaintext") -}}
{{- fail "auth.tokensSecret with tls.mode plaintext would send tokens that anybody can read" -}}
{{- end -}}
{{- end -}}
