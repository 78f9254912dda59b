{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{- define "godwit.orchestrator.args" -}}
{{- $o := .Values.orchestrator -}}
{{- $any := ternary "[::]" "0.0.0.0" (eq .Values.node.ipFamily "IPv6") -}}
- --rest={{ $any }}:8080
- --grpc={{ $any }}:8081
- --advertise={{ include "godwit.node.host" . }}:8080
{{- if include "godwit.tls" . }}
- --tls-dir=/etc/godwit/tls
{{- else }}
- --insecure-plaintext
{{- end }}
{{- if eq $o.store.type "postgresql" }}
- --lease={{ $o.store.postgresql.leaseSeconds }}
{{- end }}
{{- with $o.controller }}
{{- if .enabled }}
- --kubernetes
- --on-cordon={{ .onCordon }}
- --when-uncordoned={{ .whenUncordoned }}
- --object-ttl={{ .objectTtlSeconds }}
{{- end }}
{{- end }}
{{- if $o.evictionWebhook.enabled }}
- --webhook={{ $any }}:8443
- --webhook-tls-dir=/etc/godwit/tls
{{- end }}
{{- if .Values.auth.tokensSecret }}
- --tokens-file=/etc/godwit/auth/tokens
{{- end }}
{{- with .Values.auth.oidc }}
{{- if .issuer }}
- --oidc-issuer={{ .issuer }}
- --oidc-audience={{ .audience }}
- --oidc-role-claim={{ .roleClaim }}
- --oidc-name-claim={{ .nameClaim }}
{{- range $word, $role := .roles }}
- --oidc-role={{ $word }}={{ $role }}
{{- end }}
{{- end }}
{{- end }}
{{- range $o.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}
