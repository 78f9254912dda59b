{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{- define "godwit.node.env" -}}
- name: NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- end -}}

{{- /* TLS and metrics, which page server and agent have alike; metrics have no TLS. */ -}}
{{- define "godwit.node.listen" -}}
{{- if include "godwit.tls" . }}
- --tls-dir=/etc/godwit/tls
{{- end }}
{{- if or .Values.metrics.enabled (not (include "godwit.tls" .)) }}
- --insecure-plaintext
{{- end }}
{{- end -}}

{{- define "godwit.pageServer.args" -}}
{{- $host := include "godwit.node.host" . -}}
- --listen={{ $host }}:7443
- --control=127.0.0.1:7444
- --metrics={{ ternary $host "127.0.0.1" .Values.metrics.enabled }}:9444
- --images-dir=/var/lib/godwit/node/images
- --ram-dir=/var/lib/godwit/ram
- --drain-s={{ .Values.node.pageServer.drainSeconds }}
{{- include "godwit.node.listen" . }}
{{- range .Values.node.pageServer.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "godwit.agent.args" -}}
{{- $host := include "godwit.node.host" . -}}
{{- $agent := .Values.node.agent -}}
- --respawn
- --node=$(NODE_NAME)
- --listen={{ $host }}:7440
- --metrics={{ ternary $host "127.0.0.1" .Values.metrics.enabled }}:9440
- --state-dir=/var/lib/godwit/node
- --images-dir=/var/lib/godwit/node/images
- --ram-dir=/var/lib/godwit/ram
- --page-server-control=127.0.0.1:7444
- --orchestrator={{ include "godwit.orchestrator.host" . }}:{{ .Values.orchestrator.service.grpcPort }}
- --drain-s={{ $agent.drainSeconds }}
{{- with $agent.peerBytesPerSecondMax }}
- --peer-bytes-per-s-max={{ int64 . }}
{{- end }}
{{- include "godwit.node.listen" . }}
{{- range $agent.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "godwit.agent.devices" -}}
{{- $devices := dict -}}
{{- range $name, $count := .Values.node.agent.devices -}}
{{- $_ := set $devices $name (int $count | toString) -}}
{{- end -}}
{{- if and .Values.node.agent.networkTaps.enabled .Values.devicePlugin.enabled -}}
{{- $_ := set $devices "godwit.io/tun" "1" -}}
{{- end -}}
{{- toYaml $devices -}}
{{- end -}}

{{- define "godwit.agent.resources" -}}
{{- $resources := deepCopy .Values.node.agent.resources -}}
{{- $devices := include "godwit.agent.devices" . | fromYaml -}}
{{- $_ := set $resources "limits" (merge (default dict $resources.limits) $devices) -}}
{{- toYaml $resources -}}
{{- end -}}

{{- define "godwit.agent.security" -}}
{{- $agent := .Values.node.agent -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  {{- if or $agent.injection.enabled $agent.networkTaps.enabled }}
  add:
    {{- if $agent.injection.enabled }}
    - SYS_PTRACE
    {{- end }}
    {{- if $agent.networkTaps.enabled }}
    - NET_ADMIN
    {{- end }}
  {{- end }}
{{- if $agent.injection.enabled }}
appArmorProfile:
  type: Unconfined
{{- end }}
{{- end -}}

{{- define "godwit.keeper.certificates" -}}
- --certificates-from=/etc/godwit/tls-all
- --certificates-of=$(NODE_NAME)
- --certificates-to=/etc/godwit/tls
{{- end -}}

{{- define "godwit.keeper.certificateMounts" -}}
- {name: tls-all, mountPath: /etc/godwit/tls-all, readOnly: true}
- {name: tls, mountPath: /etc/godwit/tls}
{{- end -}}

{{- /* What is copied lies in memory, and goes with the pod. */ -}}
{{- define "godwit.node.tlsVolumes" -}}
{{- $mode := .Values.tls.mode -}}
{{- if eq $mode "existing" -}}
- name: tls
  hostPath: {path: {{ .Values.tls.existing.nodeDirectory }}, type: Directory}
{{- else if ne $mode "plaintext" -}}
- name: tls
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
- name: tls-all
  {{- if eq $mode "selfSigned" }}
  secret:
    secretName: {{ include "godwit.secret.nodes" . }}
    defaultMode: 0400
  {{- else }}
  projected:
    defaultMode: 0400
    sources:
      {{- range $index, $node := .Values.tls.certManager.nodes }}
      - secret:
          name: {{ include "godwit.fullname" $ }}-node-{{ $node }}-tls
          # A node whose certificate is not there yet keeps no other waiting.
          optional: true
          items:
            - {key: tls.crt, path: {{ $node }}.crt}
            - {key: tls.key, path: {{ $node }}.key}
            {{- if not $index }}
            - {key: ca.crt, path: ca.crt}
            {{- end }}
      {{- end }}
  {{- end }}
{{- end }}
{{- end -}}
